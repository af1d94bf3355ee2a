"""Interface between a training loop and its sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tools.rlhf.data import Prompt
from tools.rlhf.rollout.rollout import Rollout


class Sampler(Protocol):
    """Samples replies from the last published policy."""

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> Rollout:
        """Sample one reply per prompt from softmax(logits / temperature).

        No top-k or top-p: PPO's ratio does not model them. Every rank calls it, with its own prompts.

        Args:
            prompts: B prompts; equal prompts get independent replies.
            seed: seed of the replies; equal seed, prompts and weights give equal replies.
        """
        ...


def rollout_seed(seed: int, step: int, rank: int) -> int:
    """A distinct seed per (seed, step, rank), by a multiplicative hash within torch's 63 bits."""
    return ((seed * 1_000_003 + step) * 1_000_003 + rank + 1) % 2**63
