"""E4M3 numbers in blocks that share a scale: to bf16 and back.

A code stands for sign, 4 bits of exponent (bias 7) and 3 of mantissa; 0x7f and 0xff are NaN, and there is no infinity
(Micikevicius et al., 2022). A weight is its code's number times the block's scale, a product in fp32 rounded once
to bf16, as DeepSeek's and transformers' own programs do. Scales are fp32, bf16, or E8M0: an exponent alone, of 8 bits
and bias 127, where 0xff is NaN (OCP Microscaling Formats, 1.0).

Back: a block whose every number is what some code times the block's old scale gives, keeps that scale, and so gets its
codes. That finds the codes it was made of: two neighbouring numbers of E4M3 are at least 2^-4 of the larger one apart,
and the rounding to bf16 moves a product by 2^-9 of itself at most. It holds as long as no product leaves bf16's normal
range (a scale between 2^-117 and 2^119, signs included); a block of zeros may have any scale. Any other block gets a
new scale, its largest magnitude / 448.
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
_SMALLEST_SCALE = 2.0**-126  # fp32's smallest normal number


class NotFiniteError(ValueError):
    """A changed block holds NaN or infinity."""


@cache
def code_values() -> np.ndarray:
    """The number of every code, `[256]` float32."""
    import numpy as np

    code = np.arange(256, dtype=np.uint32)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = np.ldexp(1.0 + mantissa / 8, exponent.astype(np.int32) - 7)
    value = np.where(exponent == 0, mantissa * 2.0**-9, normal).astype(np.float32)
    value[code & 0x7F == 0x7F] = np.nan
    return np.copysign(value, np.where(code & 0x80, np.float32(-1), np.float32(1)))


def read_scales(data: memoryview, dtype: str) -> np.ndarray:
    """Scales of a type, by its safetensors name, as float32: exact."""
    import numpy as np

    if dtype != E8M0:
        return to_float32(data, BY_SAFETENSORS[dtype])
    codes = np.frombuffer(data, dtype=np.uint8)
    return np.where(codes == 0xFF, np.float32(np.nan), np.ldexp(np.float32(1), codes.astype(np.int32) - 127))


def write_scales(scales: np.ndarray, dtype: str) -> memoryview:
    """The same backwards; those of E8M0 are powers of two."""
    import numpy as np

    if dtype != E8M0:
        return from_float32(scales, BY_SAFETENSORS[dtype])
    mantissas, exponents = np.frexp(scales)
    assert (mantissas == 0.5).all(), "scales of E8M0 are powers of two"
    return memoryview((exponents + 126).astype(np.uint8))


def product_table(scales: np.ndarray) -> np.ndarray:
    """What each code gives with each scale: bits of bf16, `[..., 256]` uint16 for scales `[...]` float32."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        exact = scales[..., None] * code_values()
        # NaN takes the code's sign: it comes back as the same one of the two
        exact = np.where(np.isnan(code_values()), code_values(), exact)
        return np.frombuffer(from_float32(exact, BF16), dtype=np.uint16).reshape(exact.shape)


def encode(values: np.ndarray) -> np.ndarray:
    """Codes of float32 numbers, rounded to nearest, ties to even; beyond 448 it stays 448, NaN stays NaN."""
    import numpy as np

    bits = np.ascontiguousarray(values).view(np.uint32)
    return _codes()[bits >> 16 | (bits & 0xFFFF != 0)]


@cache
def _codes() -> np.ndarray:
    """The code of every float32 number by its upper half, of which the last bit tells whether any lower one is set.

    That bit and those below it are far behind the last that a code has: they only say on which side of a tie it is.
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
    """Codes and scale of one block of float32 numbers, whose scale was `scale`.

    Raises:
        NotFiniteError: it was changed, and holds NaN or infinity.
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
