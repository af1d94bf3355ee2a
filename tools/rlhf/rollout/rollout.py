"""Roll-outs: the policy's own replies, and its log-probabilities as the sampler saw them.

Layout of a batch: prompts are padded on the left, replies start in one column.
`[pad pad p1 p2 p3 | r1 r2 EOS pad]`: `ids` [B, P + T], the reply in the columns from P on.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tools.rlhf.data import Prompt


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a policy wrote after a prompt."""

    ids: tuple[int, ...]
    """Its tokens, through the end-of-sequence token if there is one."""
    text: str
    """The same without special tokens."""
    ended: bool
    """Whether it ends with an end-of-sequence token."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A batch of sampled replies. B replies, P prompt columns, T reply columns."""

    prompts: tuple[Prompt, ...]
    replies: tuple[Reply, ...]
    ids: Tensor
    """[B, P + T]."""
    attention_mask: Tensor
    """[B, P + T]: 1 on prompt and reply tokens (through the EOS), 0 on padding."""
    reply_mask: Tensor
    """[B, T] float: 1 on reply tokens."""
    sampler_log_probs: Tensor
    """[B, T]: log-probability of each reply token when it was sampled; 0 after the end."""

    @property
    def position_ids(self) -> Tensor:
        """[B, P + T]: 0 at each prompt's first token."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def reply_ids(self) -> Tensor:
        """[B, T]."""
        return self.ids[:, -self.reply_mask.shape[1] :]
