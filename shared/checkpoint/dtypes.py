"""Dtypes of weights under their three names (torch, safetensors, torch storage), and casts between them."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shared.errors import UserError

if TYPE_CHECKING:  # imported on use: most conversions only copy bytes
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Dtype:
    """A floating-point dtype of weights."""

    name: str  # torch's
    safetensors: str
    storage: str  # torch's legacy storage class
    size: int  # bytes


BF16 = Dtype(name="bfloat16", safetensors="BF16", storage="BFloat16Storage", size=2)
FP16 = Dtype(name="float16", safetensors="F16", storage="HalfStorage", size=2)
FP32 = Dtype(name="float32", safetensors="F32", storage="FloatStorage", size=4)
# Only in Megatron checkpoints, for zero-centred gamma: `weight - 1` is exact in float64.
FP64 = Dtype(name="float64", safetensors="F64", storage="DoubleStorage", size=8)

BY_NAME = {dtype.name: dtype for dtype in (BF16, FP16, FP32, FP64)}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in (BF16, FP16, FP32)}
BY_STORAGE = {dtype.storage: dtype for dtype in (BF16, FP16, FP32, FP64)}
BY_FLAG = {"bf16": BF16, "fp16": FP16, "fp32": FP32}

# Bits of every dtype a safetensors header may name. Weights have one of the dtypes above, or a quantised one.
SAFETENSORS_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


def weight_dtype(name: str, tensor: str, place: str) -> Dtype:
    """The dtype of a weight by its safetensors name; UserError if it is not BF16, F16 or F32."""
    if name not in BY_SAFETENSORS:
        raise UserError(f"{place}: {tensor} is {name}; BF16, F16 or F32 is required (a quantised model?)")
    return BY_SAFETENSORS[name]


def common(dtypes: Iterable[Dtype]) -> Dtype:
    """The smallest dtype that represents all of these exactly."""
    distinct = set(dtypes)
    if FP64 in distinct:
        return FP64
    return distinct.pop() if len(distinct) == 1 else FP32


def scalar_bytes(value: Literal[0, 1], dtype: Dtype) -> bytes:
    """The bytes of 0 or 1 in a dtype."""
    if dtype is BF16:
        return struct.pack("<f", value)[2:]
    return struct.pack({FP16: "<e", FP32: "<f", FP64: "<d"}[dtype], value)


def to_float32(data: memoryview, dtype: Dtype) -> np.ndarray:
    """Upcast a block to flat float32. Exact, hence not of float64: see `to_float64`."""
    import numpy as np

    assert dtype is not FP64, "float32 is narrower"
    if dtype is FP32:
        return np.frombuffer(data, dtype=np.float32)
    if dtype is FP16:
        return np.frombuffer(data, dtype=np.float16).astype(np.float32)
    return (np.frombuffer(data, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def to_float64(data: memoryview, dtype: Dtype) -> np.ndarray:
    """Upcast a block to flat float64. Exact."""
    import numpy as np

    return np.frombuffer(data, dtype=np.float64) if dtype is FP64 else to_float32(data, dtype).astype(np.float64)


def from_float32(values: np.ndarray, dtype: Dtype) -> memoryview:
    """Downcast flat float32 values: round to nearest, ties to even, as torch does."""
    import numpy as np

    if dtype is FP32:
        return memoryview(np.ascontiguousarray(values)).cast("B")
    if dtype is FP16:
        with np.errstate(over="ignore"):  # overflow gives infinity, as in torch
            return memoryview(values.astype(np.float16)).cast("B")
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if (nan := np.isnan(values)).any():  # rounding up a NaN's payload could carry into the exponent or the sign
        payload = (bits[nan] >> 16).astype(np.uint16)
        rounded[nan] = np.where(payload & 0x7F, payload, payload | 0x40)
    return memoryview(rounded).cast("B")


def from_float64(values: np.ndarray, dtype: Dtype) -> memoryview:
    """Downcast flat float64 values: one rounding to nearest, ties to even.

    Through float32, which is rounded to odd on the way to 16 bits: of the two neighbours of a number the one whose last bit is
    1. That bit remembers on which side of a 16-bit tie the number is (Boldo and Melquiond, "Emulation of a FMA and correctly
    rounded sums", 2008); rounded to nearest twice, a number just beside a tie would go the wrong way.
    """
    import numpy as np

    if dtype is FP64:
        return memoryview(np.ascontiguousarray(values)).cast("B")
    with np.errstate(over="ignore", invalid="ignore"):  # overflow gives infinity; a signalling NaN stays a NaN
        nearest = values.astype(np.float32)
        if dtype is not FP32:
            bits, wide = nearest.view(np.int32), nearest.astype(np.float64)
            # Sign and magnitude: the next bit pattern is further from zero. NaN: no step.
            step = (wide < values).view(np.int8) - (wide > values).view(np.int8)
            np.negative(step, out=step, where=np.signbit(values))
            bits += step * (bits & 1 == 0)
    return from_float32(nearest, dtype)


def cast(data: memoryview, source: Dtype, target: Dtype) -> memoryview:
    """Cast a block, rounding once. An upcast is exact; a downcast after an upcast restores the bits."""
    if source is target:
        return data
    if FP64 in (source, target):
        return from_float64(to_float64(data, source), target)
    return from_float32(to_float32(data, source), target)


def add(data: memoryview, constant: float, source: Dtype, target: Dtype) -> memoryview:
    """`cast(block + constant)`, the sum in float64."""
    import numpy as np

    with np.errstate(invalid="ignore", over="ignore"):
        return from_float64(to_float64(data, source) + constant, target)


def normalize_row(row: memoryview, source: Dtype, target: Dtype) -> memoryview:
    """`cast(row / max(||row||_2, 1e-12))`, in float64.

    The lower bound is that of `torch.nn.functional.normalize`: a zero row stays zero.
    """
    import numpy as np

    values = to_float64(row, source)
    with np.errstate(invalid="ignore"):  # infinity by infinity is NaN, as in torch
        return from_float64(values / np.maximum(np.sqrt(values @ values), 1e-12), target)


def count_not_finite(data: memoryview, dtype: Dtype) -> tuple[int, int]:
    """Number of NaN and of infinities in a block."""
    import numpy as np

    values = np.frombuffer(data, dtype=f"u{dtype.size}")
    exponent, mantissa = {
        BF16: (0x7F80, 0x7F),
        FP16: (0x7C00, 0x3FF),
        FP32: (0x7F800000, 0x7FFFFF),
        FP64: (0x7FF << 52, (1 << 52) - 1),
    }[dtype]
    special = values[(values & exponent) == exponent]
    nan = int(np.count_nonzero(special & mantissa))
    return nan, int(special.size) - nan
