"""MXFP4 codec: groups of 32 E2M1 codes (4 bits) with one E8M0 scale, to bf16 and back.

Two codes per byte, low nibble first (OCP Microscaling Formats 1.0; transformers' `convert_moe_packed_tensors`). A scale
byte means 2^(byte - 127). Products are exact in bf16 except on overflow.

Requantise: if every value of a group equals `value(code) * old scale` for some code, the group keeps its scale and those
codes: an unchanged group round-trips exactly, except for scale bytes from 253 (overflow). A changed group gets the
smallest power of two >= amax / 6, as OpenAI's converter does.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from shared.checkpoint.dtypes import BF16, from_float32, to_float32
from shared.quantized.fp8_blocks import NotFiniteError

if TYPE_CHECKING:
    import numpy as np

GROUP = 32  # values per group
CODES = GROUP // 2  # bytes of codes per group
SCALE = 1  # byte per scale
_BIAS = 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@cache
def product_table() -> np.ndarray:
    """`bf16(value(code) * 2^(scale - 127))` as bits: `[256 scales, 16 codes]` uint16."""
    import numpy as np

    numbers = np.array([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)], dtype=np.float32)
    with np.errstate(over="ignore"):
        exact = np.ldexp(numbers, np.arange(256)[:, None] - _BIAS)
    return np.frombuffer(from_float32(exact, BF16), dtype=np.uint16).reshape(256, 16)


def decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Dequantise: codes `[groups, 16]` uint8, scales `[groups]` uint8 -> bf16 bits `[groups, 32]`."""
    import numpy as np

    table, base = product_table().reshape(-1), scales.astype(np.uint16)[:, None] << 4
    result = np.empty((len(codes), GROUP), dtype=np.uint16)
    result[:, 0::2] = table[base | (codes & 15)]
    result[:, 1::2] = table[base | (codes >> 4)]
    return result


def requantize(values: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes `[groups, 16]` and scales `[groups]` of float32 values `[groups, 32]` with old scales `scales`.

    Raises:
        NotFiniteError: a changed group contains NaN or infinity.
    """
    import numpy as np

    codes = _encode(values, scales)
    again = to_float32(memoryview(decode(codes, scales)).cast("B"), BF16).reshape(values.shape)
    changed = (again.view(np.uint32) != np.ascontiguousarray(values).view(np.uint32)).any(axis=1)
    if not changed.any():
        return codes, scales
    largest = np.abs(values[changed]).max(axis=1)
    if not np.isfinite(largest).all():
        raise NotFiniteError
    mantissa, exponent = np.frexp(largest / np.float32(6))
    exponent = np.where(largest > 0, exponent - (mantissa == 0.5), 0)
    new = scales.copy()
    new[changed] = np.clip(exponent + _BIAS, 0, 254).astype(np.uint8)
    codes[changed] = _encode(values[changed], new[changed])
    return codes, new


def _encode(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to the even code, saturate at 6, and pack two codes per byte."""
    import numpy as np

    with np.errstate(all="ignore"):
        magnitude = np.ldexp(np.abs(values), _BIAS - scales.astype(np.int32)[:, None])
    code = np.zeros(values.shape, dtype=np.uint8)
    for place, (low, high) in enumerate(pairwise(_MAGNITUDES)):
        tie = (low + high) / 2
        code += magnitude > tie if place % 2 == 0 else magnitude >= tie
    code |= np.signbit(values).astype(np.uint8) << 3
    return code[:, 0::2] | code[:, 1::2] << 4
