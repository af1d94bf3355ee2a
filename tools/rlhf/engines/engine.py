"""Interface between a training loop and the training library."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Engine(Protocol):
    """A model and its optimizer, on every rank. All ranks make the same calls.

    An update is a fixed number of micro-batches per rank: forward and `backward` for each, then one `step`.
    """

    @property
    def module(self) -> Any:
        """The model without wrappers; used for `generate` and for weight names."""
        ...

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward pass."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss (scalar). The update's gradient is the sum over micro-batches and ranks."""
        ...

    def step(self) -> None:
        """Clip the gradient, update the parameters, clear the gradient."""
        ...

    def gradient_norm(self) -> float | None:
        """Global gradient norm of the last update, before clipping; None if unknown."""
        ...

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of all later updates."""
        ...

    def full_weights(self) -> dict[str, Tensor]:
        """The unsharded state dict on the CPU of rank 0; empty on other ranks."""
        ...

    def save(self, directory: Path) -> None:
        """Write a checkpoint for a bitwise identical resume; every rank writes its shard."""
        ...

    def load(self, directory: Path) -> None:
        """Load a checkpoint of `save`, with the same number of ranks."""
        ...
