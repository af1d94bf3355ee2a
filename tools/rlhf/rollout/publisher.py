"""Interface for passing the policy's weights to the sampler."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Policy(Protocol):
    """What is published; an `Engine` is one."""

    @property
    def module(self) -> Any:
        """The transformers model, for its names."""
        ...

    def full_weights(self) -> dict[str, Tensor]:
        """The unsharded state dict on the CPU of rank 0; empty on other ranks. Every rank calls it."""
        ...


class Publisher(Protocol):
    """Passes a policy's weights to a `Sampler`."""

    def publish(self, policy: Policy, version: int) -> None:
        """Publish the current weights; all later samples use them.

        Every rank calls it before each roll-out.

        Args:
            policy: the policy.
            version: number of iterations trained; 0 for the initial weights.
        """
        ...


class InProcessPublisher:
    """For `InProcessSampler`, which samples from the engine's weights directly."""

    def publish(self, policy: Policy, version: int) -> None:
        """Nothing to do."""
