"""Context parallelism (CP): a sequence over several ranks, and what core attention exchanges between them.

A sequence is cut into 2 x CP equal chunks. Rank r holds chunks r and 2 CP - 1 - r ("zigzag"), so every rank has the same
share of causal attention:

    CP 2:   chunk   0   1   2   3
            rank    0   1   1   0

It is the cut of Megatron-Core's RoPE (`get_pos_emb_on_this_cp_rank`) and MTP (`roll_tensor`). Everything but attention works
on single tokens. Segments `[batch, sequence]` are not cut: every rank has those of whole rows.

Shapes: S sequence, C = S / CP its part on a rank, B batch, H query heads, G key/value heads, D and V their sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from shared.parallel import ContextExchange

# Values of Megatron-Core's `cp_comm_type`.
COMMUNICATION: dict[ContextExchange, str] = {"gather": "all_gather", "heads": "a2a"}

# q, k, v and segments to `[queries, batch, heads * value_dim]`. Keys are the first of a row, queries the last of the keys.
type Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def chunks_of_rank(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of a context-parallel rank, of 2 x `size`."""
    return rank, 2 * size - 1 - rank


def local_part(whole: torch.Tensor) -> torch.Tensor:
    """This rank's chunks along the last axis, `[.., S]` -> `[.., C]`; `whole` itself without context parallelism."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return whole
    chunks = whole.chunk(2 * group.size(), -1)
    return torch.cat([chunks[index] for index in chunks_of_rank(group.rank(), group.size())], -1)


class Exchange(Protocol):
    """Core attention of this rank's queries, by communication with the other context-parallel ranks."""

    def heads(self, of_rank: torch.Tensor) -> torch.Tensor:
        """Of a tensor of the tensor-parallel rank's query heads `[H]`: the heads that `attend` gets."""
        ...

    def __call__(
        self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor | None
    ) -> torch.Tensor:
        """q `[C, B, H, D]`, k `[C, B, G, D]`, v `[C, B, G, V]`, segments `[B, S]` -> `[C, B, H * V]`."""
        ...


class Alone:
    """Without context parallelism."""

    def heads(self, of_rank: torch.Tensor) -> torch.Tensor:
        return of_rank

    def __call__(
        self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor | None
    ) -> torch.Tensor:
        return attend(q, k, v, segments)


class KeyValueGather:
    """Gathers keys and values of all ranks; queries stay. Backward reduce-scatters the gradients of keys and values.

    Each of the two chunks attends to the keys up to its own end.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.group = group

    def heads(self, of_rank: torch.Tensor) -> torch.Tensor:
        return of_rank

    def __call__(
        self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor | None
    ) -> torch.Tensor:
        both = gather_from_sequence_parallel_region(torch.cat((k, v), -1), group=self.group)
        whole = _natural_order(both, self.group.size())
        length = len(q) // 2
        ends = [(index + 1) * length for index in chunks_of_rank(self.group.rank(), self.group.size())]
        attended = []
        for queries, end in zip(q.split(length), ends, strict=True):
            keys, values = whole[:end].split((k.shape[-1], v.shape[-1]), -1)
            attended.append(attend(queries, keys, values, segments))
        return torch.cat(attended)


class HeadExchange:
    """All-to-all: from all heads of a part of the sequence to a part of the heads of the whole sequence, and back (Ulysses,
    arXiv:2309.14509). CP divides query and key/value heads of a tensor-parallel rank.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.group = group

    def heads(self, of_rank: torch.Tensor) -> torch.Tensor:
        return of_rank.chunk(self.group.size())[self.group.rank()]

    def __call__(
        self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor | None
    ) -> torch.Tensor:
        size, (length, batch) = self.group.size(), q.shape[:2]
        # [C, B, heads, ..] to [C, B, CP, heads / CP * ..]: one message for q, k and v.
        parts = [x.reshape(length, batch, size, -1) for x in (q, k, v)]
        sent = torch.cat(parts, -1).permute(2, 0, 1, 3).flatten(0, 1)
        whole = _natural_order(all_to_all(self.group, sent), size)
        own = [
            part.unflatten(-1, (-1, x.shape[-1]))
            for part, x in zip(whole.split([part.shape[-1] for part in parts], -1), (q, k, v), strict=True)
        ]
        attended = attend(own[0], own[1], own[2], segments)
        back = all_to_all(self.group, _rank_order(attended, size))
        return back.unflatten(0, (size, length)).permute(1, 2, 0, 3).flatten(2)


def exchange_of(config: TransformerConfig) -> Exchange:
    """The exchange of core attention: `cp_comm_type` of `config` over the context-parallel group."""
    if config.context_parallel_size == 1:
        return Alone()
    exchange = HeadExchange if config.cp_comm_type == COMMUNICATION["heads"] else KeyValueGather
    return exchange(parallel_state.get_context_parallel_group())


def _order(size: int) -> list[int]:
    """Chunks in the order of ranks."""
    return [index for rank in range(size) for index in chunks_of_rank(rank, size)]


def _natural_order(of_ranks: torch.Tensor, size: int) -> torch.Tensor:
    """`[S, ..]`, the ranks' parts one after another, to the order of the sequence."""
    chunks, order = of_ranks.chunk(2 * size), _order(size)
    return torch.cat([chunks[order.index(index)] for index in range(2 * size)])


def _rank_order(natural: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `_natural_order`."""
    chunks = natural.chunk(2 * size)
    return torch.cat([chunks[index] for index in _order(size)])
