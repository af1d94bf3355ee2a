"""The seam between a training loop and whatever samples from its policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tools.rlhf.data import Prompt
from tools.rlhf.rollout.rollout import Rollout


class Sampler(Protocol):
    """Samples replies from the policy that its `Publisher` published last."""

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> Rollout:
        """One reply to each prompt, from softmax(logits / temperature) without top-k or top-p, which PPO's ratio ignores.

        Every rank calls it, with prompts of its own.

        Args:
            prompts: B prompts; equal prompts get independent replies.
            seed: with prompts and weights it determines the replies.
        """
        ...
