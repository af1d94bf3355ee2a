"""Attention with linear biases."""

from __future__ import annotations

import math

import torch


def slopes(heads: int) -> torch.Tensor:
    """How much each head subtracts from a score for each token of distance, `[heads]` fp32.

    Press et al. (2021): a geometric series from `2^(-8/n)` on for `n` heads, a power of two. Other numbers of heads
    take the series of the power of two below, then every other term of the series of twice as many.
    """
    below = 2 ** math.floor(math.log2(heads))
    series = _series(below, range(1, below + 1))
    rest = heads - below
    return torch.tensor(series + _series(2 * below, range(1, 2 * rest, 2)), dtype=torch.float32)


def _series(heads: int, terms: range) -> list[float]:
    base = 2.0 ** (-8.0 / heads)
    return [base**term for term in terms]


def bias(slopes: torch.Tensor, length: int) -> torch.Tensor:
    """What is added to scores, `[1, heads, length, length]`: `slope * (key - query)`, zero on the diagonal."""
    positions = torch.arange(length, device=slopes.device)
    distance = positions[None, :] - positions[:, None]
    return slopes[None, :, None, None] * distance


def rounded_bias(slopes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The same as Falcon RW was trained: `slope * key` in bf16, `[batch, heads, length, length]` fp32.

    Less the query's own, which changes no probability. `positions` `[batch, length]` count from the start of each
    token's text, for the rounding depends on them. transformers' `build_alibi_tensor` of Falcon.
    """
    products = (slopes.bfloat16()[:, None] * positions[:, None, :]).float()  # [batch, heads, length]
    return products[:, :, None, :] - products[:, :, :, None]
