"""The seam between a training loop and the library that trains its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Engine(Protocol):
    """A model and its optimizer. Every rank has one, and all ranks make the same calls.

    An update is a fixed number of micro-batches on every rank: forward and `backward` for each, then `step`.
    """

    @property
    def module(self) -> Any:
        """The model without wrappers: what `generate` samples from, and what names the weights."""
        ...

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward pass."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss (scalar); an update's gradient is the sum over micro-batches and ranks."""
        ...

    def step(self) -> None:
        """Clip the gradient, update the parameters, clear the gradient."""
        ...

    def gradient_norm(self) -> float | None:
        """Global norm of the last update's gradient before clipping; None where it is not known."""
        ...

    def set_learning_rate(self, rate: float) -> None:
        """The rate of every later update."""
        ...

    def full_weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of the state dict by name, unsharded, on the CPU of rank 0; empty on other ranks."""
        ...

    def save(self, directory: Path) -> None:
        """Write what `load` needs to go on bit by bit; every rank writes its part."""
        ...

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote, with the same number of ranks."""
        ...
