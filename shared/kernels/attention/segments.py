"""Attention segment by segment, and within a segment block of queries by block: no mask or matrix of scores of whole rows.

A row of S tokens in segments of n_1, n_2, ... tokens costs `sum n_i^2`, not `S^2`; a segment of n tokens with a window of w
keys costs `2 n w`. The kernel of a block is SDPA, or the eager one for soft cap and sinks. Shapes: as in `needs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

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
    here = [(max(first, query_start), first, min(last, end)) for first, last in borders]
    here = [(begin, first, last) for begin, first, last in here if begin < last]
    queries = _spans(q, [(begin - query_start, last - query_start) for begin, _, last in here])
    keys, values = (_spans(x, [(first, last) for _, first, last in here]) for x in (k, v))
    parts = [within(*given) for given in zip(queries, keys, values, strict=True)]
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _spans(x: torch.Tensor, spans: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """`x[:, :, first:last]` of each span. Their gradients are added up in one tensor.

    Of slices, each gradient would be a tensor of the whole row, with zeros: segments times tokens, not tokens.
    """
    if len(spans) == 1:
        first, last = spans[0]
        return (x[:, :, first:last],)
    found: tuple[torch.Tensor, ...] = _Spans.apply(x, spans)
    return found


class _Spans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, spans: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        ctx.spans, ctx.shape = spans, x.shape
        return tuple(x[:, :, first:last] for first, last in spans)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for (first, last), grad in zip(ctx.spans, grads, strict=True):
            total[:, :, first:last] += grad
        return total, None


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
    before = keys - queries
    ends = [(begin, min(begin + size, keys)) for begin in range(before, keys, size)]
    seen = [(max(begin - window + 1, 0), end) for begin, end in ends]
    rows = _spans(q, [(begin - before, end - before) for begin, end in ends])
    given: Iterable[tuple[torch.Tensor, ...]]
    if window < keys:
        given = zip(rows, _spans(k, seen), _spans(v, seen), strict=True)
    else:  # together the blocks see quadratically many keys: their gradients are added one by one
        given = ((row, k[:, :, :end], v[:, :, :end]) for row, (_, end) in zip(rows, ends, strict=True))
    blocks = []
    for (first, _), tensors in zip(seen, given, strict=True):
        block = partial(_block, features=features, window=window, start=first)
        blocks.append(block(*tensors) if kept else checkpoint(block, *tensors, use_reentrant=False))
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
