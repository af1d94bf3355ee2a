"""Amax and codes of matrices by Triton kernels: `torch_coder`'s functions in one or two passes over memory.

Codes are computed by integer operations on the bits of the scaled fp32 numbers: the bytes are torch's in Triton's interpreter, on
GPUs with FP8 units and without. (The interpreter's own cast to FP8 is wrong for 2% of numbers: the carry out of the mantissa
does not reach the exponent.) Absolute values are compared as integers, too: bits of fp32 numbers that are not negative are in the
numbers' order, and NaN is above infinity.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself: only constants have one.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from shared.kernels.fp8.codes import E4M3, LARGEST
from shared.kernels.fp8.fused_source import Source
from shared.kernels.fp8.torch_coder import Blocks, Encoded
from shared.kernels.fp8.triton_source import gated_gradient, inverse_rms, normed_gradient, operands, read

__all__ = ["encode_blocks", "encode_matrix", "gated_gradient", "inverse_rms", "normed_gradient", "row_amax"]

# (mantissa bits, bias, largest number, its bits, bits of the first clipped number, bits of the last that rounds to zero): the
# constants of `codes`, as fp32.
_CONSTANTS = {
    E4M3: (3, 7, LARGEST[E4M3], 0x43E00000, 0x43E80000, 0x3A800000),
    torch.float8_e5m2: (2, 15, LARGEST[torch.float8_e5m2], 0x47600000, 0x47700000, 0x37000000),
}
_TILE = 64  # rows and columns of a program that also writes the transpose
_WIDE = (4, 1024)  # of one that reads rows alone


@triton.jit
def _bits(x):
    """Bits of absolute values; above `_INFINITY` of NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _code(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST_BITS: tl.constexpr):
    """FP8 codes of fp32 numbers, uint8: the nearest, ties to even; the largest for what is above it; NaN stays NaN."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = _bits(x)
    not_a_number = size > 0x7F800000
    size = tl.minimum(size, LARGEST_BITS)
    exponent = size >> 23
    # A normal FP8 number: the mantissa is rounded, a carry goes into the exponent, whose bias is changed.
    normal = (size + ((1 << (SHIFT - 1)) - 1) + ((size >> SHIFT) & 1)) >> SHIFT
    normal -= (127 - BIAS) << MANTISSA
    # A subnormal one: the mantissa with its hidden bit, shifted by the missing exponents; from 25 on nothing is left.
    mantissa = (size & 0x7FFFFF) | 0x800000
    shift = tl.minimum(tl.maximum(SHIFT + 128 - BIAS - exponent, 1), 25)
    small = (mantissa + (1 << (shift - 1)) - 1 + ((mantissa >> shift) & 1)) >> shift
    code = tl.where(exponent > 127 - BIAS, normal, small)
    return (tl.where(not_a_number, 0x7F, code) | sign).to(tl.uint8)


@triton.jit
def _scale(amax_bits, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """`scales.scale_of`."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.maximum(scale, 1.1754943508222875e-38)
    return tl.where((amax_bits > 0) & (amax_bits <= 0x7F800000), scale, 1.0)


@triton.jit
def _count(partial, program, x, scaled, CLIPPED_BITS: tl.constexpr, ZERO_BITS: tl.constexpr):
    """Write a program's largest bits of `x`, and how many of `scaled` were clipped, became zero, and were not zero."""
    size = _bits(scaled)
    clipped = (size >= CLIPPED_BITS) & (size <= 0x7F800000)
    place = partial + 4 * program
    tl.store(place, tl.max(tl.max(_bits(x), 1), 0))
    tl.store(place + 1, tl.sum(tl.sum(clipped.to(tl.int32), 1), 0))
    tl.store(place + 2, tl.sum(tl.sum(((size > 0) & (size <= ZERO_BITS)).to(tl.int32), 1), 0))
    tl.store(place + 3, tl.sum(tl.sum((size > 0).to(tl.int32), 1), 0))


@triton.jit
def _row_amax(
    x, second, third, out, rows, columns,
    row_stride, column_stride, second_row, second_column, third_row, third_column,
    SOURCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    highest = tl.zeros([ROWS], tl.int32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS).to(tl.int64)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        tile = read(
            x, second, third, row, column, inside,
            row_stride, column_stride, second_row, second_column, third_row, third_column, SOURCE,
        )  # fmt: skip
        highest = tl.maximum(highest, tl.max(_bits(tile), 1))
    tl.store(out + row, highest.to(tl.float32, bitcast=True), mask=row < rows)


@triton.jit
def _tile(
    x, second, third, rows, columns,
    row_stride, column_stride, second_row, second_column, third_row, third_column, SOURCE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """This program's rows and columns, which of them are inside, and what is read there."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tile = read(
        x, second, third, row, column, inside,
        row_stride, column_stride, second_row, second_column, third_row, third_column, SOURCE,
    )  # fmt: skip
    return row, column, inside, tile


@triton.jit
def _encode_tile(
    x, second, third, scale, codes, transposed, partial, rows, columns,
    row_stride, column_stride, second_row, second_column, third_row, third_column, SOURCE: tl.constexpr,
    MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST_BITS: tl.constexpr, CLIPPED_BITS: tl.constexpr, ZERO_BITS: tl.constexpr,
    OF_ROWS: tl.constexpr, TRANSPOSED: tl.constexpr, RECORD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, inside, tile = _tile(
        x, second, third, rows, columns,
        row_stride, column_stride, second_row, second_column, third_row, third_column, SOURCE, TILE,
    )  # fmt: skip
    if OF_ROWS:  # noqa: SIM108 -- decided while it is compiled
        by = tl.load(scale + row, mask=row < rows, other=1.0)[:, None]
    else:
        by = tl.load(scale)
    scaled = tl.div_rn(tile, tl.zeros([TILE, TILE], tl.float32) + by)
    code = _code(scaled, MANTISSA, BIAS, LARGEST_BITS)
    tl.store(codes + row[:, None] * columns + column[None, :], code, mask=inside)
    if TRANSPOSED:
        outside = (column[:, None] < columns) & (row[None, :] < rows)
        tl.store(transposed + column[:, None] * rows + row[None, :], tl.trans(code), mask=outside)
    if RECORD:
        _count(partial, tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tile, scaled, CLIPPED_BITS, ZERO_BITS)


@triton.jit
def _encode_block(
    x, second, third, codes, scale, transposed, transposed_scale, partial, rows, columns,
    row_stride, column_stride, second_row, second_column, third_row, third_column, SOURCE: tl.constexpr,
    MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, LARGEST_BITS: tl.constexpr,
    CLIPPED_BITS: tl.constexpr, ZERO_BITS: tl.constexpr,
    SQUARE: tl.constexpr, POWER_OF_TWO: tl.constexpr, TRANSPOSED: tl.constexpr, RECORD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, inside, tile = _tile(
        x, second, third, rows, columns,
        row_stride, column_stride, second_row, second_column, third_row, third_column, SOURCE, TILE,
    )  # fmt: skip
    size = _bits(tile)
    if SQUARE:
        by_row = _scale(tl.zeros([1], tl.int32) + tl.max(tl.max(size, 1), 0), LARGEST, POWER_OF_TWO)
        place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1) + tl.arange(0, 1)
        tl.store(scale + place, by_row)
    else:
        by_row = _scale(tl.max(size, 1), LARGEST, POWER_OF_TWO)
        tl.store(scale + row * tl.num_programs(1) + tl.program_id(1), by_row, mask=row < rows)
    scaled = tl.div_rn(tile, tl.zeros([TILE, TILE], tl.float32) + by_row[:, None])
    code = _code(scaled, MANTISSA, BIAS, LARGEST_BITS)
    tl.store(codes + row[:, None] * columns + column[None, :], code, mask=inside)
    if TRANSPOSED:
        if SQUARE:
            place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0) + tl.arange(0, 1)
            tl.store(transposed_scale + place, by_row)
        else:
            by_column = _scale(tl.max(size, 0), LARGEST, POWER_OF_TWO)
            tl.store(
                transposed_scale + column * tl.num_programs(0) + tl.program_id(0), by_column, mask=column < columns
            )
            code = _code(
                tl.div_rn(tile, tl.zeros([TILE, TILE], tl.float32) + by_column[None, :]), MANTISSA, BIAS, LARGEST_BITS
            )
        outside = (column[:, None] < columns) & (row[None, :] < rows)
        tl.store(transposed + column[:, None] * rows + row[None, :], tl.trans(code), mask=outside)
    if RECORD:
        _count(partial, tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tile, scaled, CLIPPED_BITS, ZERO_BITS)


def row_amax(x: Source) -> torch.Tensor:
    """As `torch_coder.row_amax`."""
    out = torch.zeros(len(x), 1, dtype=torch.float32, device=x.device)
    if x.shape.numel():
        pointers, strides, kind = operands(x)
        rows, columns = _WIDE if strides[1] == 1 else (_TILE, _TILE)
        _row_amax[triton.cdiv(len(x), rows),](
            *pointers, out, *x.shape, *strides, SOURCE=kind, ROWS=rows, COLUMNS=columns
        )
    return out


def encode_matrix(
    x: Source, scale: torch.Tensor, dtype: torch.dtype, *, transposed: bool = False, record: bool = False
) -> Encoded:
    """As `torch_coder.encode_matrix`."""
    assert not (transposed and scale.dim()), "the transpose has other scales"
    codes, other, partial = _outputs(x, _TILE, transposed, record)
    mantissa, bias, _, largest_bits, clipped, zero = _CONSTANTS[dtype]
    if x.shape.numel():
        pointers, strides, kind = operands(x)
        _encode_tile[triton.cdiv(x.shape[0], _TILE), triton.cdiv(x.shape[1], _TILE)](
            *pointers, scale, codes, other, partial, *x.shape, *strides, SOURCE=kind,
            MANTISSA=mantissa, BIAS=bias, LARGEST_BITS=largest_bits, CLIPPED_BITS=clipped, ZERO_BITS=zero,
            OF_ROWS=scale.dim() > 0, TRANSPOSED=transposed, RECORD=record, TILE=_TILE,
        )  # fmt: skip
    return Encoded(
        codes=codes.view(dtype),
        scale=scale,
        transposed=other.view(dtype) if transposed else None,
        transposed_scale=scale if transposed else None,
        **_recorded(partial, record),
    )


def encode_blocks(
    x: Source, blocks: Blocks, dtype: torch.dtype, *, transposed: bool = False, record: bool = False
) -> Encoded:
    """As `torch_coder.encode_blocks`, in one pass."""
    rows, width = blocks.rows, blocks.width
    codes, other, partial = _outputs(x, width, transposed, record)
    high, wide = (triton.cdiv(size, width) for size in x.shape)

    def scales(along: int, across: int, columns: int) -> torch.Tensor:
        return torch.empty(along if rows == 1 else across, columns, dtype=torch.float32, device=x.device)

    scale, other_scale = scales(x.shape[0], high, wide), scales(x.shape[1], wide, high)
    mantissa, bias, largest, largest_bits, clipped, zero = _CONSTANTS[dtype]
    if x.shape.numel():
        pointers, strides, kind = operands(x)
        _encode_block[high, wide](
            *pointers, codes, scale, other, other_scale, partial, *x.shape, *strides, SOURCE=kind,
            MANTISSA=mantissa, BIAS=bias, LARGEST=largest, LARGEST_BITS=largest_bits, CLIPPED_BITS=clipped, ZERO_BITS=zero,
            SQUARE=rows > 1, POWER_OF_TWO=blocks.power_of_two, TRANSPOSED=transposed, RECORD=record, TILE=width, num_warps=8,
        )  # fmt: skip
    return Encoded(
        codes=codes.view(dtype),
        scale=scale,
        transposed=other.view(dtype) if transposed else None,
        transposed_scale=other_scale if transposed else None,
        **_recorded(partial, record),
    )


def _outputs(x: Source, tile: int, transposed: bool, record: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, codes of the transpose, and amax and counts of each program; what is not asked for is empty."""
    programs = triton.cdiv(x.shape[0], tile) * triton.cdiv(x.shape[1], tile) if record else 0
    return (
        torch.empty(x.shape, dtype=torch.uint8, device=x.device),
        torch.empty(x.shape[::-1] if transposed else (0,), dtype=torch.uint8, device=x.device),
        torch.empty(programs, 4, dtype=torch.int32, device=x.device),
    )


def _recorded(partial: torch.Tensor, record: bool) -> dict[str, Any]:
    """Amax and counts over all programs: integers, the same in any order."""
    if not record:
        return {}
    if not len(partial):
        return {"amax": partial.new_zeros((), dtype=torch.float32), "counts": partial.new_zeros(3, dtype=torch.int64)}
    return {"amax": partial[:, 0].amax().view(torch.float32), "counts": partial[:, 1:].sum(0, dtype=torch.int64)}
