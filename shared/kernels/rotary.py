"""Application of RoPE to queries or keys (Su et al., 2021).

Shapes: S sequence, B batch, H heads, D head_dim, R rotary_dim <= D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def cos_sin(angles: torch.Tensor, factor: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of angles `[S, 1 or B, 1, R]` in radians, times the concentration factor in fp32, rounded to `dtype`."""
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Rotate pairs in the first R elements of each head; the others pass.

    Args:
        x: `[S, B, H, D]`.
        cos: `[S, 1 or B, 1, R]`, of x's dtype; one value for each element of x.
        sin: as cos.
        interleaved: pairs are elements (2i, 2i + 1); else (i, i + R / 2).

    Returns:
        `[S, B, H, D]`, contiguous. With its gradient it is equal to the bit to Megatron-Core's `_apply_rotary_pos_emb_bshd`
        on the CPU: the products and sums are the same, and only their concatenation and negation are left out.
    """
    rotated: torch.Tensor = _Rotation.apply(x, cos, sin, interleaved)
    return rotated


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        rotary_dim = cos.shape[-1]
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.mul(x[..., :rotary_dim], cos, out=out[..., :rotary_dim])
        (x_1, x_2), (out_1, out_2), (sin_1, sin_2) = (_pair(each, rotary_dim, interleaved) for each in (x, out, sin))
        out_1.sub_(x_2 * sin_1)
        out_2.add_(x_1 * sin_2)
        out[..., rotary_dim:] = x[..., rotary_dim:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # The transpose of the rotation: sin_1 and sin_2 change places and sign.
        cos, sin = ctx.saved_tensors
        rotary_dim = cos.shape[-1]
        out = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
        torch.mul(gradient[..., :rotary_dim], cos, out=out[..., :rotary_dim])
        (gradient_1, gradient_2), (out_1, out_2), (sin_1, sin_2) = (
            _pair(each, rotary_dim, ctx.interleaved) for each in (gradient, out, sin)
        )
        out_1.add_(gradient_2 * sin_2)
        out_2.sub_(gradient_1 * sin_1)
        out[..., rotary_dim:] = gradient[..., rotary_dim:]
        return out, None, None, None


def _pair(x: torch.Tensor, rotary_dim: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and of the second elements of all pairs."""
    if interleaved:
        return x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    half = rotary_dim // 2
    return x[..., :half], x[..., half:rotary_dim]
