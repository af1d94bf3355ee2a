"""A batch of sampled replies, as tensors and as text.

Shapes: B replies on this rank, P prompt columns, T reply columns. Prompts are padded on the left, replies on the right, so
that every reply starts in column P: `[pad pad p1 p2 p3 | r1 r2 EOS pad]`.
"""

from __future__ import annotations

from collections.abc import Iterator
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
class Sequences:
    """Prompts and replies as a model reads them."""

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
        """Keyword arguments of a model."""
        return {"input_ids": self.ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids}

    def rows(self, index: Tensor) -> Sequences:
        """The rows of `index`, without the columns in which all of them are padding."""
        mask, reply_mask = self.attention_mask[index], self.reply_mask[index]
        used = mask.any(0).nonzero()
        first, stop = int(used[0]), int(used[-1]) + 1
        return Sequences(
            ids=self.ids[index, first:stop],
            attention_mask=mask[:, first:stop],
            reply_mask=reply_mask[:, : int(reply_mask.any(0).sum())],
        )

    def micro_batches(self, rows: Tensor, size: int) -> Iterator[tuple[Tensor, Sequences]]:
        """The rows in parts of `size`, each with its indices; sorted by length, so that a part has little padding."""
        lengths = self.attention_mask[rows].sum(-1)
        for index in rows[lengths.argsort(stable=True)].split(size):
            yield index, self.rows(index)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What a sampler returns: one reply to each of B prompts."""

    prompts: tuple[Prompt, ...]
    replies: tuple[Reply, ...]
    sequences: Sequences
    sampler_log_probs: Tensor
    """[B, T] float32: log-probability of each reply token under the sampled distribution; 0 after the end."""
