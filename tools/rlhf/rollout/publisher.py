"""Interface for passing the policy's weights to the sampler."""

from __future__ import annotations

from typing import Protocol

from tools.rlhf.engines.engine import Engine


class Publisher(Protocol):
    """Passes a policy's weights to a `Sampler`."""

    def publish(self, policy: Engine, version: int) -> None:
        """Publish the current weights; all later samples use them.

        Every rank calls it before each roll-out.

        Args:
            policy: the policy's engine.
            version: number of iterations trained; 0 for the initial weights.
        """
        ...


class InProcessPublisher:
    """For `InProcessSampler`, which samples from the engine's weights directly."""

    def publish(self, policy: Engine, version: int) -> None:
        """Nothing to do."""
