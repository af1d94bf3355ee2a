"""The inference engine behind `generate`, `chat` and `evaluate`: one interface, one implementation per back end.

An engine is opened on a Hugging Face directory, which checks model and settings in seconds, and loads the weights later.
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
    seed: int = 0  # sample i of the prompt is seeded by `seed + i`, whatever else is in the batch


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to complete."""

    prompt: list[int]  # token ids
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample of a prompt's continuation."""

    text: str  # without special tokens
    tokens: list[int]  # ids, with the end-of-sequence token if the model produced it
    finish_reason: str  # "stop": end of sequence; "length": max_tokens or the context is used up


@runtime_checkable
class Engine(Protocol):
    """A model on one back end. The weights are loaded by `load`, or by the first method that needs them."""

    name: str  # as --engine spells it

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and completion together."""
        ...

    def load(self) -> None:
        """Load the weights. UserError for a model that the back end refuses."""
        ...

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Completion]]]:
        """Complete prompts, each shorter than the context.

        Yields:
            Index of a request and its samples in order, as soon as all of them are finished.
        """
        ...

    def stream(self, request: Request) -> Iterator[str]:
        """The text of one sample, in pieces as they are generated."""
        ...

    def harness_model(self) -> LM:
        """lm-evaluation-harness's own class for this back end, so that log-likelihoods are the harness's to the last digit.

        One model fits a process: called before `load`, which then shares its weights.
        """
        ...

    def close(self) -> None:
        """Release the model."""
        ...


def open_engine(source: Path, settings: EngineSettings) -> Engine:
    """The engine that `settings` name, on the directory `source`. The one place where an engine is chosen.

    Raises:
        UserError: the back end does not support the model or the settings.
    """
    if settings.engine == "vllm":
        from tools.infer.engines.vllm import VllmEngine

        return VllmEngine(source, settings)
    from tools.infer.engines.transformers import TransformersEngine

    return TransformersEngine(source, settings)


def pieces(texts: Iterable[tuple[str, bool]]) -> Iterator[str]:
    """What a growing text gains at each step.

    Args:
        texts: (text so far, whether it is finished). An incomplete character decodes to U+FFFD until its last byte comes.
    """
    shown = 0
    for text, finished in texts:
        stable = text if finished else text.rstrip("\N{REPLACEMENT CHARACTER}")
        yield stable[shown:]
        shown = max(shown, len(stable))
