"""FP8 block codec: E4M3 codes in blocks with one scale each, to bf16 and back.

E4M3: sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7f and 0xff are NaN, no infinity (Micikevicius et al., 2022).
Scales: fp32, bf16 or E8M0 (8 exponent bits, bias 127, 0xff is NaN; OCP Microscaling Formats 1.0).

Dequantise: `bf16(fp32(value(code)) * scale)`, one rounding, as DeepSeek and transformers do.

Requantise: if every value of a block equals `bf16(value(code) * old scale)` for some code, the block keeps its scale and
those codes: an unchanged block round-trips exactly. Proof: neighbouring E4M3 values differ by at least 2^-4 of the larger,
rounding to bf16 moves a product by at most 2^-9 of itself. Valid while products stay in bf16's normal range,
2^-117 <= scale <= 2^119; a block of zeros may have any scale. A changed block gets `scale = amax / 448`.

Shapes: `[rows, columns]` weights, `[ceil(rows / block rows), ceil(columns / block columns)]` scales.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from shared.checkpoint.dtypes import BF16, BY_SAFETENSORS, from_float32, to_float32

if TYPE_CHECKING:
    import numpy as np

LARGEST = 448.0
E8M0 = "F8_E8M0"
SCALE_TYPES = ("F32", "BF16", E8M0)
_SMALLEST_NORMAL = 2.0**-6
_SMALLEST_SCALE = 2.0**-126  # the smallest normal fp32


class NotFiniteError(ValueError):
    """A changed block or group contains NaN or infinity."""


@cache
def code_values() -> np.ndarray:
    """The value of every code, `[256]` float32."""
    import numpy as np

    code = np.arange(256, dtype=np.uint32)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = np.ldexp(1.0 + mantissa / 8, exponent.astype(np.int32) - 7)
    value = np.where(exponent == 0, mantissa * 2.0**-9, normal).astype(np.float32)
    value[code & 0x7F == 0x7F] = np.nan
    return np.copysign(value, np.where(code & 0x80, np.float32(-1), np.float32(1)))


def read_scales(data: memoryview, dtype: str) -> np.ndarray:
    """Scales of a safetensors dtype as float32. Exact."""
    import numpy as np

    if dtype != E8M0:
        return to_float32(data, BY_SAFETENSORS[dtype])
    codes = np.frombuffer(data, dtype=np.uint8)
    return np.where(codes == 0xFF, np.float32(np.nan), np.ldexp(np.float32(1), codes.astype(np.int32) - 127))


def write_scales(scales: np.ndarray, dtype: str) -> memoryview:
    """The inverse of `read_scales`; E8M0 scales are powers of two."""
    import numpy as np

    if dtype != E8M0:
        return from_float32(scales, BY_SAFETENSORS[dtype])
    mantissas, exponents = np.frexp(scales)
    assert (mantissas == 0.5).all(), "scales of E8M0 are powers of two"
    return memoryview((exponents + 126).astype(np.uint8))


def product_table(scales: np.ndarray) -> np.ndarray:
    """`bf16(value(code) * scale)` of all codes as bits: `[..., 256]` uint16 for scales `[...]` float32."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        exact = scales[..., None] * code_values()
        # NaN keeps the code's sign, so that 0x7f and 0xff round-trip.
        exact = np.where(np.isnan(code_values()), code_values(), exact)
        return np.frombuffer(from_float32(exact, BF16), dtype=np.uint16).reshape(exact.shape)


def encode(values: np.ndarray) -> np.ndarray:
    """Codes of float32 values: round to nearest, ties to even, saturate at 448; NaN stays NaN."""
    import numpy as np

    bits = np.ascontiguousarray(values).view(np.uint32)
    return _codes()[bits >> 16 | (bits & 0xFFFF != 0)]


@cache
def _codes() -> np.ndarray:
    """Lookup table: upper 16 bits of a float32, the last one a sticky bit of the lower 16, to its code, `[65536]` uint8.

    A code needs 3 of the 7 mantissa bits; the rest, with the sticky bit, decides the rounding.
    """
    import numpy as np

    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0x7FFFF + (magnitude >> 20 & 1) >> 20) - (120 << 3)  # exponents of a bias of 7, not 127
    value = magnitude.view(np.float32)
    small = value < _SMALLEST_NORMAL
    subnormal = np.rint(np.where(small, value, 0) * np.float32(2**9)).astype(np.uint32)
    code = np.where(small, subnormal, np.minimum(normal, 0x7E))
    code = np.where(np.isnan(value), 0x7F, code)
    return (code | bits >> 24 & 0x80).astype(np.uint8)


def requantize(values: np.ndarray, scale: np.float32, *, powers_of_two: bool) -> tuple[np.ndarray, np.float32]:
    """Codes and scale of one block of float32 values.

    Args:
        values: `[rows, columns]`.
        scale: the block's old scale, kept if the block is unchanged.
        powers_of_two: round a new scale up to a power of two.

    Raises:
        NotFiniteError: the block was changed and contains NaN or infinity.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        codes = encode(values / scale if scale else values)
        again = to_float32(memoryview(product_table(np.float32(scale))), BF16)[codes]
    if np.array_equal(again.view(np.uint32), np.ascontiguousarray(values).view(np.uint32)):
        return codes, scale
    largest = np.abs(values).max()
    if not np.isfinite(largest):
        raise NotFiniteError
    new = np.maximum(largest / np.float32(LARGEST), _SMALLEST_SCALE) if largest else np.float32(1)
    if powers_of_two:
        mantissa, exponent = np.frexp(new)
        new = np.float32(np.ldexp(1.0, int(exponent) - (mantissa == 0.5)))
    return encode(values / new), new
