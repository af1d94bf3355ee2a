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
    """`attend` on each segment by itself, `[B, H, S, V]`. Rows with the same borders are one batch."""
    rows = _borders(segments_BS)
    if len(set(rows)) > 1:
        each = zip(*(x.split(1) for x in (q_BHSD, k_BGSD, v_BGSV, segments_BS)), strict=True)
        return torch.cat([_cut(attend, q, k, v, row) for (q, k, v, _), row in zip(each, rows, strict=True)])
    return _cut(attend, q_BHSD, k_BGSD, v_BGSV, rows[0])


def within_window(
    attend: MaskedAttend, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSV: torch.Tensor, size: int
) -> torch.Tensor:
    """`attend` with each query's last `size` keys, its own included, `[B, H, S, V]`; blocks of `size` queries.

    `attend` gets a mask, bool `[1, 1, queries, keys]` (True: attend); None for the whole row, causal.
    """
    length = q_BHSD.shape[2]
    if size >= length:
        return attend(q_BHSD, k_BGSD, v_BGSV, None)
    blocks = []
    for begin in range(0, length, size):
        end, first = min(begin + size, length), max(begin - size + 1, 0)
        allowed = masks.window(end - first, size, q_BHSD.device)[:, :, begin - first :]
        blocks.append(attend(q_BHSD[:, :, begin:end], k_BGSD[:, :, first:end], v_BGSV[:, :, first:end], allowed))
    return torch.cat(blocks, 2)


def _cut(attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: Borders) -> torch.Tensor:
    if len(borders) == 1:
        return attend(q, k, v)
    return torch.cat([attend(*(x[:, :, begin:end] for x in (q, k, v))) for begin, end in borders], 2)


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
