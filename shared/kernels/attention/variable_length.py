"""Segments as borders and as cumulative lengths, and tensors without a batch axis for variable-length kernels.

Shapes: as in `needs`; T tokens of all rows, N segments of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from shared.kernels.attention.needs import Call

type Borders = tuple[tuple[int, int], ...]  # first token of each segment, first token after it

_MULTIPLE = 8  # of the head_dim that flash kernels take


@dataclass(frozen=True, kw_only=True, eq=False)
class Lengths:
    """Arguments of a variable-length kernel. Query i of a segment is its key `i + keys - queries`.

    Attributes:
        queries_N1: cumulative numbers of queries, `[N + 1]` int32, from 0.
        keys_N1: cumulative numbers of keys, likewise.
        longest_queries: most queries of a segment.
        longest_keys: most keys of a segment.
        square: every segment has as many queries as keys.
    """

    queries_N1: torch.Tensor
    keys_N1: torch.Tensor
    longest_queries: int
    longest_keys: int
    square: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Queries, keys and values without a batch axis, all of one width, a multiple of 8."""

    q_THW: torch.Tensor
    k_TGW: torch.Tensor
    v_TGW: torch.Tensor
    lengths: Lengths
    unpack: Callable[[torch.Tensor], torch.Tensor]  # `[T, H, W]` -> `[B, H, Q, V]`


def pack(call: Call) -> Packed:
    """Rows one after another. Keys that no query attends to, before the first segment and after the last query, are left out.

    Zeros are appended to heads: to `q k^T` they add nothing, and the output's last columns are dropped. The softmax scale is
    that of D.
    """
    q_BHQD, k_BGKD, v_BGKV = call.q_BHQD, call.k_BGKD, call.v_BGKV
    (batch, _, queries, head_dim), value_dim = q_BHQD.shape, v_BGKV.shape[3]
    width = -(-max(head_dim, value_dim) // _MULTIPLE) * _MULTIPLE
    ranges, lengths = _layout(call)
    whole = [(0, queries)] * batch
    return Packed(
        q_THW=_flat(q_BHQD, whole, width),
        k_TGW=_flat(k_BGKD, ranges, width),
        v_TGW=_flat(v_BGKV, ranges, width),
        lengths=lengths,
        unpack=partial(_unpack, batch=batch, value_dim=value_dim),
    )


def _unpack(out_THW: torch.Tensor, *, batch: int, value_dim: int) -> torch.Tensor:
    return out_THW[..., :value_dim].unflatten(0, (batch, -1)).transpose(1, 2)


def _flat(x_BHSD: torch.Tensor, ranges: list[tuple[int, int]], width: int) -> torch.Tensor:
    x_BSHD = x_BHSD.transpose(1, 2)
    if len(set(ranges)) == 1:
        begin, end = ranges[0]
        flat = x_BSHD[:, begin:end].flatten(0, 1)
    else:
        flat = torch.cat([row[begin:end] for row, (begin, end) in zip(x_BSHD, ranges, strict=True)])
    return pad(flat, (0, width - flat.shape[-1])) if width != flat.shape[-1] else flat


def _layout(call: Call) -> tuple[list[tuple[int, int]], Lengths]:
    segments_BK, query_start, device = call.segments, call.query_start, call.k_BGKD.device
    batch, queries, keys = call.q_BHQD.shape[0], call.q_BHQD.shape[2], call.k_BGKD.shape[2]
    if segments_BK is None:
        return _whole_rows(batch, keys, query_start, queries, device)
    if segments_BK not in _layouts:
        _layouts[segments_BK] = {}
    known, key = _layouts[segments_BK], (query_start, queries)
    if key not in known:
        known[key] = _lengths(borders(segments_BK), query_start, queries, device)
    found: tuple[list[tuple[int, int]], Lengths] = known[key]
    return found


@lru_cache(maxsize=16)
def _whole_rows(
    batch: int, keys: int, query_start: int, queries: int, device: torch.device
) -> tuple[list[tuple[int, int]], Lengths]:
    return _lengths([((0, keys),)] * batch, query_start, queries, device)


def _lengths(
    rows: list[Borders], query_start: int, queries: int, device: torch.device
) -> tuple[list[tuple[int, int]], Lengths]:
    """The range of keys of each row, and the lengths of all segments."""
    ranges, query_counts, key_counts = [], [0], [0]
    end = query_start + queries
    for row in rows:
        own = [(first, min(last, end)) for first, last in row if last > query_start and first < end]
        ranges.append((own[0][0], end))
        query_counts += [last - max(first, query_start) for first, last in own]
        key_counts += [last - first for first, last in own]
    lengths = Lengths(
        queries_N1=torch.tensor(query_counts).cumsum(0).to(device, torch.int32),
        keys_N1=torch.tensor(key_counts).cumsum(0).to(device, torch.int32),
        longest_queries=max(query_counts),
        longest_keys=max(key_counts),
        square=query_counts == key_counts,
    )
    return ranges, lengths


_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_borders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def borders(segments_BK: torch.Tensor) -> list[Borders]:
    """Borders of the segments of each row; read from the device once for all layers of a micro batch."""
    if segments_BK not in _borders:
        length = segments_BK.shape[1]
        rows = []
        for row in segments_BK.cpu():
            inner = (torch.nonzero(row[1:] != row[:-1]).flatten() + 1).tolist()
            rows.append(tuple(zip((0, *inner), (*inner, length), strict=True)))
        _borders[segments_BK] = rows
    found: list[Borders] = _borders[segments_BK]
    return found
