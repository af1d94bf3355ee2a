"""Products of FP8 operands with `torch._scaled_mm`, on CPU and CUDA, and what CUDA asks of operands.

Letters: M, N rows of the operands; K columns, over which a product sums up; B = ceil(K / 128) blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from shared.kernels.fp8.blockwise import BLOCK, row_scales
from shared.kernels.fp8.codes import E5M2

_ALIGNMENT = 16  # CUDA: K and N are multiples of so many


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix as FP8 codes: `number = code * scale`.

    Attributes:
        codes: E4M3 or E5M2, `[rows, K]`.
        scale: fp32, of the tensor `[]`, of rows `[rows, 1]`, of 1 x 128 blocks `[rows, B]`, of 128 x 128 blocks
            `[ceil(rows / 128), B]`.
        blocks: whether the scale is of blocks.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    blocks: bool = False


def product(a: Quantized, b: Quantized, dtype: torch.dtype, *, cuda_rules: bool | None = None) -> torch.Tensor:
    """`a b^T`, summed in fp32: `[M, N]` in `dtype`.

    Products of blocks are summed up in fp32 after each 128 columns, outside of the matrix unit (arXiv:2412.19437, section 3.3.2).

    Args:
        a: `[M, K]`.
        b: `[N, K]`, with scales of the same kind.
        dtype: of the result, bf16 or fp32.
        cuda_rules: lay operands out as CUDA wants them; None: on CUDA.
    """
    assert not (a.codes.dtype == b.codes.dtype == E5M2), "CUDA multiplies no E5M2 by E5M2"
    rows, columns = len(a.codes), len(b.codes)
    if not a.codes.numel() or not b.codes.numel():
        return torch.zeros(rows, columns, dtype=dtype, device=a.codes.device)
    aligned = a.codes.device.type == "cuda" if cuda_rules is None else cuda_rules
    if a.blocks:
        return _of_blocks(a, b, aligned).to(dtype)
    if a.scale.dim():  # CUDA has scales of rows with a bf16 result only
        return _scaled(a.codes, b.codes, a.scale, b.scale.t(), torch.bfloat16 if aligned else dtype, aligned).to(dtype)
    return _scaled(a.codes, b.codes, a.scale, b.scale, dtype, aligned)


def _of_blocks(a: Quantized, b: Quantized, aligned: bool) -> torch.Tensor:
    one = torch.ones((), device=a.codes.device)
    scales_a, scales_b = row_scales(a.scale, len(a.codes)), row_scales(b.scale, len(b.codes))
    total: torch.Tensor | None = None
    for block, (left, right) in enumerate(zip(a.codes.split(BLOCK, 1), b.codes.split(BLOCK, 1), strict=True)):
        part = _scaled(left.contiguous(), right.contiguous(), one, one, torch.float32, aligned)
        part *= scales_a[:, block, None]
        part *= scales_b[:, block]
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _scaled(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype, aligned: bool
) -> torch.Tensor:
    """`_scaled_mm` of codes `[M, K]` and `[N, K]`, whose transpose is column-major."""
    columns = len(b)
    if aligned:
        width, height = -a.shape[1] % _ALIGNMENT, -columns % _ALIGNMENT
        a, b = _padded(a, width, 0), _padded(b, width, height)
        if scale_b.dim():
            scale_b = functional.pad(scale_b, (0, height), value=1.0)
    y = torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b.contiguous(), out_dtype=dtype)
    return y[:, :columns]


def _padded(codes: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """With columns and rows of zeros. Their code is the byte 0: torch pads bytes, not FP8 numbers."""
    if not (width or height):
        return codes
    return functional.pad(codes.view(torch.uint8), (0, width, 0, height)).view(codes.dtype)
