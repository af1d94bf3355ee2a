"""The inference engine of `generate`, `chat` and `evaluate`: one interface, one implementation per back end.

Opening an engine checks model and settings within seconds; the weights are loaded later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from shared.errors import UserError
from shared.precision import Precision

if TYPE_CHECKING:
    from lm_eval.api.model import LM

EngineName = Literal["vllm", "hf"]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a model is loaded."""

    engine: EngineName = "vllm"
    precision: Precision | None = None  # None: the checkpoint's
    max_model_len: int | None = None  # tokens of prompt and completion; None: the model's
    batch_size: int | None = None  # sequences at once; None: the engine's choice
    tensor_parallel: int = 1  # GPUs
    seed: int = 0

    def __post_init__(self) -> None:
        if self.engine == "hf" and self.tensor_parallel != 1:
            raise UserError("--tensor-parallel belongs to --engine vllm; leave it out")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions of a prompt are sampled."""

    max_tokens: int
    temperature: float  # 0: greedy
    top_p: float
    samples: int = 1  # completions of the prompt
    seed: int = 0  # sample i is seeded by `seed + i`, independent of the batch


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to complete."""

    prompt: list[int]  # token ids
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample of a prompt's continuation."""

    text: str  # without special tokens
    tokens: list[int]  # ids, including an end-of-sequence token if generated
    finish_reason: str  # "stop": end of sequence; "length": max_tokens or the context limit


@runtime_checkable
class Engine(Protocol):
    """A model on one back end. Weights are loaded by `load` or on first use."""

    name: str  # value of --engine

    @property
    def context_length(self) -> int:
        """Maximum tokens of prompt and completion together."""
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
    """Open the engine of `settings` for the directory `source`.

    Raises:
        UserError: the back end does not support the model or the settings.
    """
    if settings.engine == "vllm":
        from tools.infer.engines.vllm import VllmEngine

        return VllmEngine(source, settings)
    from tools.infer.engines.transformers import TransformersEngine

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
