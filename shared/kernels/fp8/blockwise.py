"""Scales of blocks, and products of operands with such scales: 1 x 128 and 128 x 128 as in DeepSeek-V3 (arXiv:2412.19437).

Letters: M, N rows of the operands; K columns, over which a product sums up; B = ceil(K / 128) blocks.
"""

from __future__ import annotations

import torch
from torch.nn import functional

BLOCK = 128


def block_amax(x: torch.Tensor, rows: int, width: int = BLOCK) -> torch.Tensor:
    """Largest absolute value of each block of `rows` x `width` elements of a matrix `[M, K]`: fp32 `[ceil(M / rows), B]`.

    The last blocks may be smaller.
    """
    padded = functional.pad(x.abs(), (0, -x.shape[1] % width, 0, -x.shape[0] % rows)).contiguous()
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // width, width)
    return blocks.amax((1, 3)).float()


def spread(scale: torch.Tensor, shape: torch.Size, rows: int, width: int = BLOCK) -> torch.Tensor:
    """The scale of each element of a matrix of `shape`; `scale`: of blocks of `rows` x `width` elements."""
    wide = scale.repeat_interleave(width, 1)[:, : shape[1]]
    return wide.repeat_interleave(rows, 0)[: shape[0]] if rows > 1 else wide


def row_scales(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """Scales of blocks as one per row: `[rows, B]` from `[rows, B]` or from `[ceil(rows / 128), B]`."""
    return scale if len(scale) == rows else scale.repeat_interleave(BLOCK, 0)[:rows]
