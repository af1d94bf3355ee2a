"""Attention with linear biases."""

from __future__ import annotations

import math

import torch


def slopes(heads: int, bias_max: int = 8) -> torch.Tensor:
    """How much each head subtracts from a score for each token of distance, `[heads]` fp32.

    Press et al. (2021): a geometric series from `2^(-8/n)` on for `n` heads, a power of two. Other numbers of heads
    take the series of the power of two below, then every other term of the series of twice as many. `bias_max` is the
    8 (llm-foundry's `gen_slopes`, by which MPT was trained).
    """
    below = 2 ** math.floor(math.log2(heads))
    series = _series(below, range(1, below + 1), bias_max)
    rest = heads - below
    return torch.tensor(series + _series(2 * below, range(1, 2 * rest, 2), bias_max), dtype=torch.float32)


def _series(heads: int, terms: range, bias_max: int) -> list[float]:
    base = 2.0 ** (-bias_max / heads)
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
