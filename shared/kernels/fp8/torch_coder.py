"""Amax and codes of matrices by torch's operations: on CPUs, and what `triton_coder` is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from shared.kernels.fp8.blockwise import BLOCK, block_amax, spread
from shared.kernels.fp8.codes import count, encode
from shared.kernels.fp8.fused_source import Gated, Normed, Source, dense, rms_norm
from shared.kernels.fp8.scales import amax, scale_of
from shared.kernels.glu import swiglu_gradient


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Codes of a matrix `[M, N]`.

    Attributes:
        codes: `[M, N]`, contiguous.
        scale: fp32; as in `Quantized`.
        transposed: codes of its transpose `[N, M]`, contiguous; None if not asked for.
        transposed_scale: scale of these.
        amax: fp32 `[]` of the matrix; None unless recorded.
        counts: int64 `[3]` of `codes.count`; None unless recorded.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    transposed: torch.Tensor | None = None
    transposed_scale: torch.Tensor | None = None
    amax: torch.Tensor | None = None
    counts: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Blocks of a matrix.

    Attributes:
        rows: 1 or `width`.
        width: columns: 128, or MXFP8's 32.
        power_of_two: as in `scale_of`.
    """

    rows: int
    width: int = BLOCK
    power_of_two: bool


def row_amax(x: Source) -> torch.Tensor:
    """The largest absolute value of each row of `[M, N]`: fp32 `[M, 1]`. NaN if the row has one; 0 of no elements."""
    return amax(dense(x), (1,))


def encode_matrix(
    x: Source, scale: torch.Tensor, dtype: torch.dtype, *, transposed: bool = False, record: bool = False
) -> Encoded:
    """Codes with a known scale.

    Args:
        x: `[M, N]`, bf16 or fp32, of any strides, or what stands for it.
        scale: fp32, of the tensor `[]` or of rows `[M, 1]`.
        dtype: E4M3 or E5M2.
        transposed: give the codes of the transpose, too; only with a scale of the tensor.
        record: give amax and counts.
    """
    assert not (transposed and scale.dim()), "the transpose has other scales"
    x = dense(x)
    scaled = x.float() / scale
    codes = encode(scaled, dtype).contiguous()
    return Encoded(
        codes=codes,
        scale=scale,
        transposed=codes.t().contiguous() if transposed else None,
        transposed_scale=scale if transposed else None,
        amax=amax(x, (0, 1)).view(()) if record else None,
        counts=count(scaled, dtype) if record else None,
    )


def encode_blocks(
    x: Source, blocks: Blocks, dtype: torch.dtype, *, transposed: bool = False, record: bool = False
) -> Encoded:
    """Codes with scales of blocks.

    Args:
        x: `[M, N]`, bf16 or fp32, of any strides, or what stands for it.
        blocks: that share a scale.
        dtype: E4M3 or E5M2.
        transposed: give the codes of the transpose, too, in blocks of the same shape.
        record: give amax and counts, the latter of the codes that are not transposed.
    """
    x = dense(x)
    found = block_amax(x, blocks.rows, blocks.width)
    scale = scale_of(found, dtype, power_of_two=blocks.power_of_two)
    scaled = x.float() / spread(scale, x.shape, blocks.rows, blocks.width)
    other = encode_blocks(x.t(), blocks, dtype) if transposed else None
    return Encoded(
        codes=encode(scaled, dtype).contiguous(),
        scale=scale,
        transposed=other.codes if other else None,
        transposed_scale=other.scale if other else None,
        amax=(found.amax() if found.numel() else found.new_zeros(())) if record else None,
        counts=count(scaled, dtype) if record else None,
    )


def inverse_rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`1 / sqrt(mean(x^2) + epsilon)` of each row of `[T, K]`: fp32 `[T, 1]`."""
    return torch.rsqrt(x.float().pow(2).mean(1, keepdim=True) + epsilon)


def gated_gradient(source: Gated, gradient: torch.Tensor) -> torch.Tensor:
    """The gradients of gate and up, `[T, 2 K]`, from that of the matrix that the source stands for."""
    out = torch.empty(len(source), 2 * source.shape[1], dtype=source.dtype, device=source.device)
    swiglu_gradient(source.gate, source.up, functional.silu(source.gate), gradient, out)
    return out


def normed_gradient(source: Normed, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x `[T, K]` and of the weight `[K]`, from that of the matrix that the source stands for."""
    with torch.enable_grad():
        x, weight = (each.detach().requires_grad_() for each in (source.x, source.weight[0]))
        y = rms_norm(x, weight, source.epsilon, zero_centered=source.zero_centered)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), gradient)
    return of_x, of_weight
