"""Reading what is quantised in a Triton kernel: a matrix, or a source computed from its operands; and gradients of sources.

Elements are rounded to bf16 by integer operations, as codes are. `silu` of all 65,536 bf16 numbers is torch's.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself: only constants have one.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from shared.kernels.fp8.fused_source import Gated, Normed, Source

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Kinds of source.
_PLAIN, _GATED, _NORMED, _ZERO_CENTERED = (tl.constexpr(kind) for kind in range(4))
_ROWS = 16  # of a program of the norm's gradient, one after another
_TILE = (16, 256)


@triton.jit
def wide(x):
    """fp32 of bf16 or fp32 numbers, by bits: the interpreter's cast makes 0.008 of subnormal bf16 numbers."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _rounded(x):
    """The nearest bf16 numbers of fp32 numbers, ties to even, as fp32. NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, x, near.to(tl.float32, bitcast=True))


@triton.jit
def _narrow(x):
    """bf16 of fp32 numbers that are bf16 numbers, by bits."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _below(x):
    """`1 + exp(-x)`: sigmoid's denominator, and SiLU's."""
    # Triton's own exp on GPUs is an approximation, torch's is libdevice's; the interpreter has no libdevice.
    if _INTERPRETED:  # noqa: SIM108 -- decided while it is compiled
        power = tl.exp(-x)
    else:
        power = libdevice.exp(-x)
    return 1.0 + power


@triton.jit
def read(
    x, second, third, row, column, inside,
    row_stride, column_stride, second_row, second_column, third_row, third_column, SOURCE: tl.constexpr,
):  # fmt: skip
    """fp32 numbers of a tile of a source; zeros outside."""
    row, column = row[:, None], column[None, :]
    tile = wide(tl.load(x + row * row_stride + column * column_stride, mask=inside, other=0.0))
    if SOURCE == _GATED:
        up = wide(tl.load(second + row * second_row + column * second_column, mask=inside, other=0.0))
        tile = _rounded(_rounded(tl.div_rn(tile, _below(tile))) * up)
    elif SOURCE != _PLAIN:
        tile *= tl.load(second + row * second_row + column * second_column, mask=inside, other=0.0)
        weight = wide(tl.load(third + row * third_row + column * third_column, mask=inside, other=0.0))
        if SOURCE == _NORMED:  # noqa: SIM108 -- decided while it is compiled
            tile = _rounded(_rounded(tile) * weight)
        else:
            tile = _rounded(tile * (1.0 + weight))
    return tile


def operands(source: Source) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...], int]:
    """The pointers, strides and kind that `read` takes."""
    if isinstance(source, Gated):
        assert source.dtype == torch.bfloat16, "its elements are rounded to bf16"
        return (source.gate, source.up, source.up), (*source.gate.stride(), *source.up.stride(), 0, 0), 1
    if isinstance(source, Normed):
        assert source.dtype == torch.bfloat16, "its elements are rounded to bf16"
        inverse, weight = (each.expand(source.shape) for each in (source.inverse, source.weight))
        strides = (*source.x.stride(), *inverse.stride(), *weight.stride())
        return (source.x, inverse, weight), strides, 3 if source.zero_centered else 2
    return (source, source, source), (*source.stride(), 0, 0, 0, 0), 0


@triton.jit
def _inverse_rms(x, out, columns, row_stride, epsilon, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        part = wide(tl.load(x + row * row_stride + column, mask=column < columns, other=0.0))
        total += part * part
    tl.store(out + row, tl.rsqrt(tl.sum(total, 0) / columns + epsilon))


def inverse_rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """As `torch_coder.inverse_rms`, summed in another order."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    if len(x):
        _inverse_rms[len(x),](x, out, x.shape[1], x.stride(0), epsilon, COLUMNS=1024)
    return out


@triton.jit
def _gated_gradient(
    gate, up, gradient, of_gate, of_up, rows, columns, row_stride, up_stride, out_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    x = wide(tl.load(gate + row * row_stride + column, mask=inside, other=0.0))
    other = wide(tl.load(up + row * up_stride + column, mask=inside, other=0.0))
    g = wide(tl.load(gradient + row * columns + column, mask=inside, other=0.0))
    below = _below(x)
    activated = _rounded(tl.div_rn(x, below))
    sigmoid = tl.div_rn(tl.zeros([ROWS, COLUMNS], tl.float32) + 1.0, below)
    slope = _rounded(g * other) * sigmoid * (1.0 + x * (1.0 - sigmoid))
    tl.store(of_gate + row * out_stride + column, _narrow(_rounded(slope)), mask=inside)
    tl.store(of_up + row * out_stride + column, _narrow(_rounded(g * activated)), mask=inside)


def gated_gradient(source: Gated, gradient: torch.Tensor) -> torch.Tensor:
    """As `torch_coder.gated_gradient`, in one pass."""
    rows, columns = source.shape
    gate, up = (each if each.stride(1) == 1 else each.contiguous() for each in (source.gate, source.up))
    out = torch.empty(rows, 2 * columns, dtype=gate.dtype, device=gate.device)
    of_gate, of_up = out.chunk(2, 1)
    if gradient.numel():
        high, wide_ = _TILE
        _gated_gradient[triton.cdiv(rows, high), triton.cdiv(columns, wide_)](
            gate, up, gradient.contiguous(), of_gate, of_up, rows, columns, gate.stride(0), up.stride(0), 2 * columns,
            ROWS=high, COLUMNS=wide_,
        )  # fmt: skip
    return out


@triton.jit
def _normed_gradient(
    x, inverse, weight, gradient, of_x, of_weight, rows, columns, row_stride,
    ZERO_CENTERED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    by = wide(tl.load(weight + column, mask=inside, other=0.0))
    if ZERO_CENTERED:
        by += 1.0
    total = tl.zeros([COLUMNS], tl.float32)
    for index in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + index
        given = inside & (row < rows)
        g = wide(tl.load(gradient + row * columns + column, mask=given, other=0.0))
        scale = tl.load(inverse + row, mask=row < rows, other=0.0)
        scaled = wide(tl.load(x + row * row_stride + column, mask=given, other=0.0)) * scale
        if ZERO_CENTERED:
            total += g * scaled
            g *= by
        else:
            total += _rounded(g * _rounded(scaled))
            g = _rounded(g * by)
        part = scale * (g - scaled * (tl.sum(g * scaled, 0) / columns))
        tl.store(of_x + row * columns + column, _narrow(_rounded(part)), mask=given)
    tl.store(of_weight + tl.program_id(0).to(tl.int64) * columns + column, total, mask=inside)


def normed_gradient(source: Normed, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `torch_coder.normed_gradient`, in one pass and a sum over programs."""
    rows, columns = source.shape
    x = source.x if source.x.stride(1) == 1 else source.x.contiguous()
    programs = triton.cdiv(rows, _ROWS)
    of_x = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    of_weight = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    if rows:
        given: Any = x, source.inverse.contiguous(), source.weight.contiguous(), gradient.contiguous()
        _normed_gradient[programs,](
            *given, of_x, of_weight, rows, columns, x.stride(0),
            ZERO_CENTERED=source.zero_centered, ROWS=_ROWS, COLUMNS=triton.next_power_of_2(columns), num_warps=8,
        )  # fmt: skip
    return of_x, of_weight.sum(0).to(source.weight.dtype)
