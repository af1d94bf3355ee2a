"""Int4 group codec: compressed-tensors `pack-quantized`, groups of 32 with one bf16 scale, to bf16 and back.

Code: integer + 8, in 4 bits; two per byte, low nibble first, which makes eight per little-endian int32.

Dequantise: `bf16(fp32(integer) * scale)`, one rounding, as compressed-tensors' `dequantize` of bf16 tensors.

Requantise: if every value of a group equals `bf16(integer * old scale)` for some integer, the group keeps its scale and
those codes: an unchanged group round-trips exactly. Proof: neighbouring integers differ by at least 1/8 of the larger,
rounding to bf16 moves a product by at most 2^-9 of itself. Exceptions: scales from 2^125 (overflow) and 0. A changed group
is quantised as compressed-tensors does with bf16 weights: `scale = bf16(amax / 7.5)`, `integer = rint(bf16(value / scale))`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.checkpoint.dtypes import BF16, from_float32, to_float32
from shared.quantized.fp8_blocks import NotFiniteError

if TYPE_CHECKING:
    import numpy as np

GROUP = 32  # values per group
CODES = GROUP // 2  # bytes of codes per group
SCALE = 2  # bytes per scale
_LOWEST, _HIGHEST = -8, 7
_SCALE_OF_ZEROS = 2.0**-7  # bf16's epsilon


def decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Dequantise: codes `[groups, 16]` uint8, scales `[groups]` bf16 bits -> bf16 bits `[groups, 32]`.

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
    """Codes `[groups, 16]` and scales `[groups]` of float32 values `[groups, 32]` with old scales `scales`.

    Raises:
        NotFiniteError: a changed group contains NaN or infinity.
    """
    import numpy as np

    old = _to_float32(scales)[:, None]
    with np.errstate(all="ignore"):
        # A zero scale: only the sign of a product is left.
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
    made[made == 0] = _to_bf16_bits(np.array([_SCALE_OF_ZEROS], dtype=np.float32))[0]
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
    """Round to nearest, ties to even, clamp, and pack two codes per byte. NaN gives an arbitrary code."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        code = (np.clip(np.rint(quotients), _LOWEST, _HIGHEST) - _LOWEST).astype(np.uint8)
    return code[:, 0::2] | code[:, 1::2] << 4
