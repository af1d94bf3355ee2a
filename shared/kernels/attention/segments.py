"""Attention segment by segment, and within a segment block of queries by block: no mask or matrix of scores of whole rows.

A row of S tokens in segments of n_1, n_2, ... tokens costs `sum n_i^2`, not `S^2`; a segment of n tokens with a window of w
keys costs `2 n w`. The kernel of a block is SDPA, or the eager one for soft cap and sinks. Shapes: as in `needs`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from shared.kernels.attention import eager, masks, sdpa
from shared.kernels.attention.needs import Call, Carries, Features
from shared.kernels.attention.variable_length import Borders, borders

CARRIES = Carries(lacks={"prefix LM": "not causal"})
BLOCK = 1024  # queries at a time: scores of a block and 128k keys are 512 MiB per head in fp32

type Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def unavailable() -> None:
    """Part of torch."""


def attend(call: Call) -> torch.Tensor:
    """As `choose.attend`. Rows with the same borders are one batch."""
    within = partial(_within_segment, features=call.features)
    given = call.q_BHQD, call.k_BGKD, call.v_BGKV
    if call.segments is None:
        return within(*given)
    rows = borders(call.segments)
    if len(set(rows)) == 1:
        return _cut(within, *given, rows[0], call.query_start)
    each = zip(*(x.split(1) for x in given), rows, strict=True)
    return torch.cat([_cut(within, q, k, v, row, call.query_start) for q, k, v, row in each])


def _cut(
    within: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: Borders, query_start: int
) -> torch.Tensor:
    """Each segment by itself, its queries and the keys up to the last of them."""
    end = query_start + q.shape[2]
    parts = []
    for first, last in borders:
        begin, last = max(first, query_start), min(last, end)
        if begin < last:
            queries = q[:, :, begin - query_start : last - query_start]
            parts.append(within(queries, k[:, :, first:last], v[:, :, first:last]))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _within_segment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, features: Features) -> torch.Tensor:
    """Causal attention whose last query is at the last key.

    Blocks with all keys before them are computed again in the backward pass: kept, their masks, biases and scores would add
    up to half of a whole row's.
    """
    queries, keys = q.shape[2], k.shape[2]
    window = keys if features.window is None else min(features.window, keys)
    plain = features.slopes_H is None and features.softcap is None and features.sinks_H is None
    if plain and window == keys and queries == keys:
        return sdpa.masked(q, k, v, None, scale=features.scale, dropout=features.dropout)
    size = min(window, BLOCK)
    kept = queries <= size or window <= BLOCK or (plain and window < keys)
    blocks = []
    for begin in range(keys - queries, keys, size):
        end, first = min(begin + size, keys), max(begin - window + 1, 0)
        rows = slice(begin - keys + queries, end - keys + queries)
        block = partial(_block, features=features, window=window, start=first)
        given = q[:, :, rows], k[:, :, first:end], v[:, :, first:end]
        blocks.append(block(*given) if kept else checkpoint(block, *given, use_reentrant=False))
    return torch.cat(blocks, 2) if len(blocks) > 1 else blocks[0]


def _block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, features: Features, window: int, start: int
) -> torch.Tensor:
    """Queries whose last is at the last key; the first key is token `start` of its segment."""
    queries, keys = q.shape[2], k.shape[2]
    allowed = masks.window(keys, window, q.device, queries)
    bias = None
    if features.slopes_H is not None:
        positions = torch.arange(start, start + keys, device=q.device)
        bias = eager.alibi_bias(features, positions[keys - queries :], positions)
    if features.softcap is not None or features.sinks_H is not None:
        return eager.masked(q, k, v, allowed, features, bias)
    mask = allowed if bias is None else bias.masked_fill(~allowed, -torch.inf).to(q.dtype)
    return sdpa.masked(q, k, v, mask, scale=features.scale, dropout=features.dropout)
