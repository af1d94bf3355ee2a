"""Attention within segments and within windows, block by block: no mask of a whole row is made.

A row of S tokens in segments of n_1, n_2, ... tokens costs `sum n_i^2`, not `S^2`; a segment of n tokens with a window of w
keys costs `2 n w`. Shapes: as in `sdpa`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from shared.kernels.attention import masks

type Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
type MaskedAttend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
type Borders = tuple[tuple[int, int], ...]  # first token of each segment, first token after it


def within_segments(
    attend: Attend, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSV: torch.Tensor, segments_BS: torch.Tensor
) -> torch.Tensor:
    """`attend` on each segment by itself, `[B, H, queries, V]`. Rows with the same borders are one batch.

    `segments_BS`: of whole rows. k and v are of the first positions of a row, q of the last of these: `attend` gets the keys
    of a segment from its start on.
    """
    rows = _borders(segments_BS)
    if len(set(rows)) > 1:
        each = zip(*(x.split(1) for x in (q_BHSD, k_BGSD, v_BGSV, segments_BS)), strict=True)
        return torch.cat([_cut(attend, q, k, v, row) for (q, k, v, _), row in zip(each, rows, strict=True)])
    return _cut(attend, q_BHSD, k_BGSD, v_BGSV, rows[0])


def within_window(
    attend: MaskedAttend, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSV: torch.Tensor, size: int
) -> torch.Tensor:
    """`attend` with each query's last `size` keys, its own included, `[B, H, queries, V]`; blocks of `size` queries.

    Queries are the last of the keys' positions. `attend` gets a mask, bool `[1, 1, queries, keys]` (True: attend); None for
    all keys, causal.
    """
    queries, keys = q_BHSD.shape[2], k_BGSD.shape[2]
    if size >= keys:
        return attend(q_BHSD, k_BGSD, v_BGSV, None)
    blocks, offset = [], keys - queries
    for begin in range(offset, keys, size):
        end, first = min(begin + size, keys), max(begin - size + 1, 0)
        allowed = masks.window(end - first, size, q_BHSD.device, end - begin)
        block = q_BHSD[:, :, begin - offset : end - offset]
        blocks.append(attend(block, k_BGSD[:, :, first:end], v_BGSV[:, :, first:end], allowed))
    return torch.cat(blocks, 2)


def _cut(attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: Borders) -> torch.Tensor:
    if len(borders) == 1:
        return attend(q, k, v)
    keys, attended = k.shape[2], []
    offset = keys - q.shape[2]
    for begin, end in borders:
        if end > offset and begin < keys:
            part = q[:, :, max(begin - offset, 0) : end - offset]
            attended.append(attend(part, k[:, :, begin:end], v[:, :, begin:end]))
    return torch.cat(attended, 2)


_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _borders(segments_BS: torch.Tensor) -> list[Borders]:
    """Borders of the segments of each row; read from the device once for all layers of a micro batch."""
    if segments_BS not in _cache:
        length = segments_BS.shape[1]
        rows = []
        for row in segments_BS.cpu():
            inner = (torch.nonzero(row[1:] != row[:-1]).flatten() + 1).tolist()
            rows.append(tuple(zip((0, *inner), (*inner, length), strict=True)))
        _cache[segments_BS] = rows
    borders: list[Borders] = _cache[segments_BS]
    return borders
