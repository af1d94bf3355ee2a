"""The seam through which a trained policy's weights reach whatever samples from it."""

from __future__ import annotations

from typing import Protocol

from tools.rlhf.engines.engine import Engine


class Publisher(Protocol):
    """Makes a policy's weights those that a `Sampler` samples from."""

    def publish(self, policy: Engine, version: int) -> None:
        """Publish the weights as they are; when it returns, every later sample is of this version.

        Every rank calls it, before each roll-out.

        Args:
            policy: the engine that trains the policy.
            version: iterations that trained these weights; 0 are the source's.
        """
        ...


class InProcessPublisher:
    """For `InProcessSampler`, which samples from the engine's own weights: every version is published already."""

    def publish(self, policy: Engine, version: int) -> None:
        """Nothing to do."""
