"""The inference engine of `generate`, `chat` and `evaluate`: one interface, one implementation per back end.

Opening an engine checks model and settings within seconds; the weights are loaded later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from shared.console import log
from shared.errors import UserError
from shared.precision import Precision
from tools.infer.engines.sampling import Sampling

if TYPE_CHECKING:
    from lm_eval.api.model import LM

EngineName = Literal["vllm", "hf"]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a model is loaded."""

    engine: EngineName | None = None  # None: vLLM where it carries the model
    precision: Precision | None = None  # None: the checkpoint's
    max_model_len: int | None = None  # tokens of prompt and completion; None: the model's
    batch_size: int | None = None  # sequences at once; None: the engine's choice
    tensor_parallel: int = 1  # GPUs
    seed: int = 0

    def __post_init__(self) -> None:
        if self.engine == "hf" and self.tensor_parallel != 1:
            raise UserError("--tensor-parallel belongs to --engine vllm; leave it out")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to complete."""

    prompt: list[int]  # token ids
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample of a prompt's continuation."""

    text: str  # without special tokens and stop texts
    tokens: list[int]  # ids, including an end-of-sequence token if generated
    finish_reason: str  # "stop": end of sequence or a stop text; "length": max_tokens or the context limit
    # For each token its own id and log-probability, then the most likely ones; None where not asked for.
    logprobs: list[list[tuple[int, float]]] | None = None


@runtime_checkable
class Engine(Protocol):
    """A model on one back end. Weights are loaded by `load` or on first use."""

    name: str  # value of --engine

    @property
    def context_length(self) -> int:
        """Maximum tokens of prompt and completion together."""
        ...

    def check(self, sampling: Sampling, place: str) -> None:
        """UserError, with `place`, for what this back end cannot do. Fast: before the weights are loaded."""
        ...

    def load(self) -> None:
        """Load the weights. UserError if the back end rejects the model."""
        ...

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Completion]]]:
        """Complete prompts; each must be shorter than the context.

        Yields:
            index of a finished request, and its samples in order.
        """
        ...

    def stream(self, request: Request) -> Iterator[str]:
        """The text of one sample, in pieces as they are generated."""
        ...

    def harness_model(self) -> LM:
        """lm-evaluation-harness's model class for this back end: log-likelihoods equal the harness's exactly.

        Call it before `load`: both share one copy of the weights.
        """
        ...

    def close(self) -> None:
        """Release the model."""
        ...


def open_engine(source: Path, settings: EngineSettings) -> Engine:
    """Open the engine of `settings` for the directory `source`. Where none is named: vLLM, and transformers for what it lacks.

    Raises:
        UserError: the back end does not support the model or the settings.
    """
    from tools.infer.engines.transformers import TransformersEngine, has_class

    if settings.engine == "hf":
        return TransformersEngine(source, settings)

    from tools.infer.engines.vllm import VllmEngine
    from tools.infer.engines.vllm_support import NotCarriedError

    try:
        return VllmEngine(source, settings)
    except NotCarriedError as error:
        if settings.engine or settings.tensor_parallel != 1 or not has_class(source):
            raise
        log(
            f"engine: transformers, which generates one sequence at a time, since vLLM does not run this model: {error}"
        )
        return TransformersEngine(source, settings)


def pieces(texts: Iterable[tuple[str, bool]]) -> Iterator[str]:
    """The text added at each step.

    Args:
        texts: (text so far, whether it is finished). An incomplete UTF-8 character decodes to U+FFFD.
    """
    shown = 0
    for text, finished in texts:
        stable = text if finished else text.rstrip("\N{REPLACEMENT CHARACTER}")
        yield stable[shown:]
        shown = max(shown, len(stable))
