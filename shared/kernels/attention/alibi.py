"""ALiBi: attention with linear biases (Press et al., 2022)."""

from __future__ import annotations

import math

import torch


def slopes(heads: int, bias_max: int = 8) -> torch.Tensor:
    """ALiBi slope of each head, `[heads]` fp32.

    n heads, a power of two: `2^(-bias_max i / n)` for i = 1..n. Otherwise: the slopes of the next lower power of two m,
    then those of 2m heads at odd i (llm-foundry's `gen_slopes`; Press et al. have bias_max = 8).
    """
    below = 2 ** math.floor(math.log2(heads))
    series = _series(below, range(1, below + 1), bias_max)
    rest = heads - below
    return torch.tensor(series + _series(2 * below, range(1, 2 * rest, 2), bias_max), dtype=torch.float32)


def _series(heads: int, terms: range, bias_max: int) -> list[float]:
    base = 2.0 ** (-bias_max / heads)
    return [base**term for term in terms]


def bias(slopes: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Bias of the scores, `[1 or batch, heads, queries, keys]`: `slope * (key position - query position)`.

    Positions of queries and keys are `[number]` or `[batch, number]`, counted from the start of their segment.
    """
    queries, keys = torch.atleast_2d(queries), torch.atleast_2d(keys)
    distance = keys[:, None, :] - queries[:, :, None]
    return slopes[None, :, None, None] * distance[:, None]


def rounded_bias(slopes: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Falcon RW's bias, fp32, arguments and shape as of `bias`: `bf16(slope * key) - bf16(slope * query)`.

    transformers' `build_alibi_tensor` of Falcon has the first term only; the second is constant per query and cancels in
    the softmax. The rounding depends on the positions.
    """
    queries, keys = torch.atleast_2d(queries), torch.atleast_2d(keys)
    rounded = slopes.bfloat16()[:, None]
    return (rounded * keys[:, None, :]).float()[:, :, None, :] - (rounded * queries[:, None, :]).float()[:, :, :, None]
