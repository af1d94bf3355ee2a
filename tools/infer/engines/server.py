"""A running server, asked over OpenAI's API: for `infer evaluate --url`."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.console import log
from shared.errors import StageError, UserError
from tools.infer.engines.engine import EngineSettings
from tools.infer.engines.scoring import CheckedRequests

if TYPE_CHECKING:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

_AT_ONCE = 32  # requests; the server batches them
_TIMEOUT = 600  # seconds of one request, its wait in the server's queue included
_ANSWER = 30  # seconds for the list of models


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model of a server."""

    base: str  # http://HOST:PORT/v1
    name: str
    context_length: int  # tokens
    key: str | None


def served_model(base: str, name: str | None, key: str | None) -> Served:
    """Ask the server at `base` for its model, its first if none is named. UserError if it is not there."""
    request = urllib.request.Request(f"{base}/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER) as answer:
            models = json.load(answer)["data"]
            lengths = {model["id"]: model.get("max_model_len") for model in models}
            parents = {model["id"]: model.get("parent") for model in models}
    except urllib.error.HTTPError as error:
        reason = "needs a key: give --api-key-file" if error.code == HTTPStatus.UNAUTHORIZED else f"status {error.code}"
        raise UserError(f"--url {base}: {reason}") from None
    except (urllib.error.URLError, TimeoutError) as error:
        cause: Any = getattr(error, "reason", error)
        raise UserError(f"--url {base}: {getattr(cause, 'strerror', None) or cause}") from None
    except (HTTPException, ConnectionError, ValueError, KeyError, TypeError):
        raise UserError(f"--url {base}: its /models is no answer of OpenAI's API") from None
    if not lengths or (name is not None and name not in lengths):
        raise UserError(f"--served-model-name {name}: the server has {', '.join(lengths) or 'no model'}")
    chosen = name or next(iter(lengths))
    length = lengths[chosen] or lengths.get(parents[chosen])  # adapters have the context of their base
    if length is None:
        raise UserError(f"--url {base}: /models does not say max_model_len of {chosen}; a server of vLLM does")
    return Served(base=base, name=chosen, context_length=length, key=key)


class ServerEngine:
    """A model of a server, as the harness asks it."""

    name = "server"

    def __init__(self, tokenizer: Path, served: Served, settings: EngineSettings) -> None:
        self._tokenizer = tokenizer  # directory of the model
        self._served = served
        self._settings = settings

    def harness_model(self) -> LocalCompletionsAPI:
        """The harness's class for servers. Token ids, windows and cuts are those of its class for vLLM."""
        from lm_eval.models.openai_completions import LocalCompletionsAPI
        from lm_eval.models.vllm_causallms import VLLM

        served, seed = self._served, self._settings.seed

        class Model(CheckedRequests, LocalCompletionsAPI):
            longest_continuation = served.context_length - 2
            max_gen_toks = 256  # the harness's default
            tok_encode = VLLM.tok_encode  # the tokenizer decides on special tokens; the class for servers adds none

            def loglikelihood(self, *given: Any, **further: Any) -> list[tuple[float, bool]]:
                with _failures_named(served.base):
                    return super().loglikelihood(*given, **further)

            def loglikelihood_rolling(self, *given: Any, **further: Any) -> list[float]:
                with _failures_named(served.base):
                    return super().loglikelihood_rolling(*given, **further)

            def generate_until(self, *given: Any, **further: Any) -> list[str]:
                self.max_length = served.context_length  # of prompt and completion; of a scored text one less
                try:
                    with _failures_named(served.base):
                        return super().generate_until(*given, **further)
                finally:
                    self.max_length = served.context_length - 1

            def _create_payload(
                self, messages: Any, generate: bool = False, gen_kwargs: dict[str, Any] | None = None, **further: Any
            ) -> dict[str, Any]:
                if not generate:
                    payload: dict[str, Any] = super()._create_payload(messages, generate=False, **further)
                    return payload
                own, stop, most = VLLM.modify_gen_kwargs(
                    gen_kwargs or {}, eos=self.eos_string, default_max_gen_toks=self.max_gen_toks
                )
                asked = {"model": self.model, "prompt": messages, "max_tokens": most, "stop": stop}
                return asked | {"seed": seed} | own

            @cached_property
            def api_key(self) -> str:
                return served.key or ""

        log(f"asking {served.base} for {served.name}")
        return Model(
            model=served.name,
            base_url=f"{served.base}/completions",
            tokenizer=str(self._tokenizer),
            tokenizer_backend="huggingface",
            num_concurrent=max(self._settings.batch_size or _AT_ONCE, 2),  # 1 is another way through the harness
            max_length=served.context_length,
            add_bos_token=None,
            seed=seed,
            timeout=_TIMEOUT,
        )

    def close(self) -> None:
        """The server goes on."""


@contextlib.contextmanager
def _failures_named(base: str) -> Iterator[None]:
    """StageError for what the harness has asked for three times in vain."""
    import aiohttp

    try:
        yield
    except aiohttp.ClientResponseError as error:
        raise StageError(f"{base} answered with status {error.status} ({error.message}); see its log") from None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise StageError(f"{base} did not answer: {error or type(error).__name__}; see its log") from None
