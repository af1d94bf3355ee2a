"""A batch of sampled replies, as tensors and text.

Shapes: B replies on this rank, P prompt columns, T reply columns. Prompts are left-padded, replies right-padded; every reply
starts in column P: `[pad pad p1 p2 p3 | r1 r2 EOS pad]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from tools.rlhf.data import Prompt


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A sampled reply."""

    ids: tuple[int, ...]
    """Token ids, through EOS if there is one."""
    text: str
    """Decoded text, without special tokens."""
    ended: bool
    """Whether the last token is EOS."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Prompts and replies as model inputs."""

    ids: Tensor
    """[B, P + T]."""
    attention_mask: Tensor
    """[B, P + T] int64: 1 on prompt and reply tokens (through the EOS), 0 on padding."""
    reply_mask: Tensor
    """[B, T] float32: 1 on reply tokens."""

    @property
    def position_ids(self) -> Tensor:
        """[B, P + T]: 0 at each prompt's first token."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def reply_ids(self) -> Tensor:
        """[B, T]."""
        return self.ids[:, -self.reply_mask.shape[1] :]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a model's forward pass."""
        return {"input_ids": self.ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids}

    def rows(self, index: Tensor) -> Sequences:
        """The rows of `index`, without all-padding columns."""
        mask, reply_mask = self.attention_mask[index], self.reply_mask[index]
        used = mask.any(0).nonzero()
        first, stop = int(used[0]), int(used[-1]) + 1
        return Sequences(
            ids=self.ids[index, first:stop],
            attention_mask=mask[:, first:stop],
            reply_mask=reply_mask[:, : int(reply_mask.any(0).sum())],
        )

    def micro_batches(self, rows: Tensor, size: int) -> Iterator[tuple[Tensor, Sequences]]:
        """Micro-batches of `size` rows, with their indices; sorted by length to reduce padding."""
        lengths = self.attention_mask[rows].sum(-1)
        for index in rows[lengths.argsort(stable=True)].split(size):
            yield index, self.rows(index)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A sampler's result: one reply to each of B prompts."""

    prompts: tuple[Prompt, ...]
    replies: tuple[Reply, ...]
    sequences: Sequences
    sampler_log_probs: Tensor
    """[B, T] float32: log-probability of each reply token under the sampling distribution; 0 after EOS."""
