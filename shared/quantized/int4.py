"""Four-bit integers, 32 to a group that shares a scale (compressed-tensors' `pack-quantized`): to bf16 and back.

A code is the number plus 8; a byte holds two, the lower half first, and so a little-endian int32 eight. A scale is a bf16
number, and a weight the product in fp32, rounded once, as compressed-tensors' own `dequantize` makes it of bf16 tensors.

Back: a group whose every number is what some code times the old scale gives keeps that scale, and so gets its codes:
numbers of neighbouring codes are at least an eighth of the larger one apart, and the rounding to bf16 moves a product by
2^-9 of itself at most. Only scales whose products overflow (2^125 and more) make that impossible, and zero, of which all
codes of a sign give the same. Any other group is quantised as compressed-tensors does with bf16 weights: its scale is the
largest magnitude / 7.5, and each number's quotient is rounded to bf16 before it is to an integer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.checkpoint.dtypes import BF16, from_float32, to_float32
from shared.quantized.fp8_blocks import NotFiniteError

if TYPE_CHECKING:
    import numpy as np

GROUP = 32  # numbers
CODES = GROUP // 2  # bytes
SCALE = 2  # bytes
_LOWEST, _HIGHEST = -8, 7
_OF_ZEROS = 2.0**-7  # the scale of a group of zeros: bf16's epsilon


def decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bits of bf16, `[groups, 32]` uint16, of codes `[groups, 16]`, bytes, and scales `[groups]`, bits of bf16.

    Raises:
        NotFiniteError: a scale is NaN or infinity.
    """
    import numpy as np

    values = _to_float32(scales)
    if not np.isfinite(values).all():
        raise NotFiniteError
    with np.errstate(over="ignore"):
        products = _to_bf16_bits(values[:, None] * np.arange(_LOWEST, _HIGHEST + 1, dtype=np.float32))
    result = np.empty((len(codes), GROUP), dtype=np.uint16)
    table, base = products.reshape(-1), np.arange(0, products.size, 16)[:, None]
    result[:, 0::2] = table[base + (codes & 15)]
    result[:, 1::2] = table[base + (codes >> 4)]
    return result


def requantize(values: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of float32 numbers `[groups, 32]` whose scales were `scales`.

    Raises:
        NotFiniteError: a changed group holds NaN or infinity.
    """
    import numpy as np

    old = _to_float32(scales)[:, None]
    with np.errstate(all="ignore"):
        # Of a scale of zero the sign is all that is left.
        codes = _pack_codes(np.where(old == 0, -np.signbit(values).astype(np.float32), values / old))
    again = _to_float32(decode(codes, scales))
    changed = (again.view(np.uint32) != np.ascontiguousarray(values).view(np.uint32)).any(axis=1)
    if not changed.any():
        return codes, scales
    rounded = _to_float32(_to_bf16_bits(values[changed]))
    largest = np.abs(rounded).max(axis=1)
    if not np.isfinite(largest).all():
        raise NotFiniteError
    made = _to_bf16_bits(largest / np.float32(7.5)).copy()
    made[made == 0] = _to_bf16_bits(np.array([_OF_ZEROS], dtype=np.float32))[0]
    new = scales.copy()
    new[changed] = made
    codes[changed] = _pack_codes(_to_float32(_to_bf16_bits(rounded / _to_float32(made)[:, None])))
    return codes, new


def _to_float32(bits: np.ndarray) -> np.ndarray:
    import numpy as np

    return to_float32(memoryview(np.ascontiguousarray(bits)).cast("B"), BF16).reshape(bits.shape)


def _to_bf16_bits(values: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.frombuffer(from_float32(values, BF16), dtype=np.uint16).reshape(values.shape)


def _pack_codes(quotients: np.ndarray) -> np.ndarray:
    """Two codes to a byte, of numbers rounded to nearest, ties to even; NaN becomes anything."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        code = (np.clip(np.rint(quotients), _LOWEST, _HIGHEST) - _LOWEST).astype(np.uint8)
    return code[:, 0::2] | code[:, 1::2] << 4
