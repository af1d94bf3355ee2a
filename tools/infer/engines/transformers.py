"""transformers in this process: slower than vLLM, the reference for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.checkpoint.directory.auxiliary_files import read_config
from shared.console import log
from shared.errors import UserError
from shared.families.common.transformers_workarounds import with_workarounds
from shared.precision import DTYPES
from tools.infer.engines.checkpoint_precision import chosen_precision
from tools.infer.engines.engine import Completion, EngineSettings, Request, pieces
from tools.infer.engines.sampling import Sampling
from tools.infer.engines.scoring import CheckedRequests
from tools.infer.environment import on_gpu
from tools.infer.source import check_weights

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from torch import Tensor

_BATCH_SIZE = 8


class _EndedError(Exception):
    """Ends `generate` of transformers, which has no other way out."""


class TransformersEngine:
    """A model in transformers: generates one sequence at a time, scores `batch_size` sequences at a time."""

    name = "hf"

    def __init__(self, source: Path, settings: EngineSettings) -> None:
        self._source = source
        self._settings = settings
        self._given = settings.max_model_len or read_config(source / "config.json").get("max_position_embeddings")
        self._lm: HFLM | None = None
        check_weights(source)

    @property
    def context_length(self) -> int:
        return self._given or self.harness_model().max_length

    def check(self, sampling: Sampling, place: str) -> None:
        for name in ("presence_penalty", "frequency_penalty", "json_schema"):
            if getattr(sampling, name):
                raise UserError(f"{place}: {name} is vLLM's; transformers has none, leave it out")

    def load(self) -> None:
        self.harness_model()

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Completion]]]:
        for index, request in enumerate(requests):
            yield index, [self._complete(request, sample) for sample in range(request.sampling.samples)]

    def stream(self, request: Request) -> Iterator[str]:
        return pieces(self._growing(request))

    def harness_model(self) -> HFLM:
        if self._lm is None:
            from lm_eval.models.huggingface import HFLM

            class Model(CheckedRequests, HFLM):
                @property
                def longest_continuation(self) -> int:  # type: ignore[override]
                    return int(self.max_length)

            log(f"loading {self._source} with transformers on {'GPU' if on_gpu() else 'CPU'}")
            precision = chosen_precision(self._source, self._settings.precision)
            try:
                self._lm = Model(
                    pretrained=str(self._source),
                    dtype=DTYPES[precision],
                    device="cuda" if on_gpu() else "cpu",
                    batch_size=self._settings.batch_size or _BATCH_SIZE,
                    # The harness's logits cache is wrong for a context that extends another example's context by the first
                    # tokens of its continuation: it returns the other example's scores.
                    logits_cache=False,
                    # Without it the harness asks the configuration, as on its own command line. It cuts a text that is
                    # longer at `max_length`, and in its class for vLLM two tokens before.
                    max_length=self._settings.max_model_len,
                )
            except (ValueError, OSError) as error:
                raise UserError(f"--source {self._source}: {str(error).strip().splitlines()[0]}") from None
            with_workarounds(self._lm.model)
        return self._lm

    def close(self) -> None:
        self._lm = None

    def _complete(self, request: Request, sample: int, streamer: Any = None) -> Completion:
        import torch
        from transformers import GenerationConfig

        lm = self.harness_model()
        model, sampling = lm.model, request.sampling
        published = model.generation_config
        ends = {lm.tokenizer.eos_token_id, *_as_list(published.eos_token_id)} - {None}
        random = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        config = GenerationConfig(
            max_new_tokens=min(sampling.max_tokens, self.context_length - len(request.prompt)),
            eos_token_id=sorted(ends),
            pad_token_id=lm.tokenizer.pad_token_id,
            do_sample=sampling.temperature > 0,
            repetition_penalty=sampling.repetition_penalty,
            stop_strings=list(sampling.stop) or None,
            return_dict_in_generate=True,
            output_logits=sampling.logprobs is not None,
            **(random if sampling.temperature > 0 else {}),
        )
        ids = torch.tensor([request.prompt], device=model.device)
        # transformers replaces None by values of the published generation config, e.g. the repetition penalty
        model.generation_config = GenerationConfig()
        try:
            with torch.random.fork_rng():
                torch.manual_seed(sampling.seed + sample)
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    streamer=streamer,
                    tokenizer=lm.tokenizer if sampling.stop else None,
                )
        finally:
            model.generation_config = published
        tokens = output.sequences[0, len(request.prompt) :].tolist()
        text = self._decode(tokens)
        stops = [text.index(stop) for stop in sampling.stop if stop in text]
        return Completion(
            text=text[: min(stops)] if stops else text,
            tokens=tokens,
            finish_reason="stop" if stops or (tokens and tokens[-1] in ends) else "length",
            logprobs=_logprobs(output.logits, tokens, sampling.logprobs),
        )

    def _growing(self, request: Request) -> Iterator[tuple[str, bool]]:
        """(text so far, whether it is finished) after each token; `generate` runs in a thread."""
        arrived: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        ended = threading.Event()  # the caller wants no more

        class Streamer:
            """Receives the prompt, then each token, from transformers."""

            def put(self, value: Any) -> None:
                if ended.is_set():
                    raise _EndedError
                arrived.put(value.flatten().tolist())

            def end(self) -> None:
                """Unused: the thread's completion marks the end, after errors too."""

        tokens: list[int] = []
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(self._complete, request, 0, Streamer())
            running.add_done_callback(lambda _: arrived.put(None))
            try:
                if arrived.get() is not None:  # the prompt
                    while (new := arrived.get()) is not None:
                        tokens += new
                        yield self._decode(tokens), False
                yield running.result().text, True
            finally:
                ended.set()

    def _decode(self, tokens: list[int]) -> str:
        return self.harness_model().tokenizer.decode(tokens, skip_special_tokens=True)


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _logprobs(
    logits: Sequence[Tensor] | None, tokens: list[int], alternatives: int | None
) -> list[list[tuple[int, float]]] | None:
    """As `Completion.logprobs`, of the logits [1, vocabulary] of each token."""
    if alternatives is None or logits is None:
        return None
    found = []
    for token, row in zip(tokens, logits, strict=True):
        known = row[0].float().log_softmax(-1)
        values, numbers = known.topk(alternatives)
        found.append([(token, known[token].item()), *zip(numbers.tolist(), values.tolist(), strict=True)])
    return found


def has_class(source: Path) -> bool:
    """Whether transformers has the class that config.json names: it needs no code of the directory."""
    import transformers

    names = read_config(source / "config.json").get("architectures") or []
    return any(hasattr(transformers, name) for name in names)
