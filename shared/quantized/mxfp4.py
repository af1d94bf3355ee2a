"""MXFP4 numbers: 32 to a group, E2M1 codes of four bits and one power of two; to bf16 and back.

A byte holds two codes, the lower half first (OCP Microscaling Formats 1.0; transformers' `convert_moe_packed_tensors`).
A scale's byte stands for 2^(byte - 127); products are exact in bf16 but where they leave its range.

Back: a group whose every number is what some code times the old scale gives keeps that scale, and so gets its codes.
Only scales whose products overflow (bytes of 253 and more) make that impossible. Any other group gets the smallest
power of two that is at least its largest magnitude / 6, as OpenAI's own program takes.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from shared.checkpoint.dtypes import BF16, from_float32, to_float32
from shared.quantized.fp8_blocks import NotFiniteError

if TYPE_CHECKING:
    import numpy as np

GROUP = 32  # numbers
CODES = GROUP // 2  # bytes
SCALE = 1  # byte
_BIAS = 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@cache
def product_table() -> np.ndarray:
    """What each code gives with each scale: bits of bf16, `[256, 16]` uint16."""
    import numpy as np

    numbers = np.array([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)], dtype=np.float32)
    with np.errstate(over="ignore"):
        exact = np.ldexp(numbers, np.arange(256)[:, None] - _BIAS)
    return np.frombuffer(from_float32(exact, BF16), dtype=np.uint16).reshape(256, 16)


def decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bits of bf16, `[groups, 32]` uint16, of codes `[groups, 16]` and scales `[groups]`, bytes both."""
    import numpy as np

    table, base = product_table().reshape(-1), scales.astype(np.uint16)[:, None] << 4
    result = np.empty((len(codes), GROUP), dtype=np.uint16)
    result[:, 0::2] = table[base | (codes & 15)]
    result[:, 1::2] = table[base | (codes >> 4)]
    return result


def requantize(values: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of float32 numbers `[groups, 32]` whose scales were `scales`.

    Raises:
        NotFiniteError: a changed group holds NaN or infinity.
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
    """Two codes to a byte, of numbers rounded to nearest, ties to the even code, 6 at most."""
    import numpy as np

    with np.errstate(all="ignore"):
        magnitude = np.ldexp(np.abs(values), _BIAS - scales.astype(np.int32)[:, None])
    code = np.zeros(values.shape, dtype=np.uint8)
    for place, (low, high) in enumerate(pairwise(_MAGNITUDES)):
        tie = (low + high) / 2
        code += magnitude > tie if place % 2 == 0 else magnitude >= tie
    code |= np.signbit(values).astype(np.uint8) << 3
    return code[:, 0::2] | code[:, 1::2] << 4
