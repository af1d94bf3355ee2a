"""FP8 codes of numbers: clamped, then cast; and how many were clipped or became zero.

E4M3 has no infinity and E5M2 has one; what a cast does with numbers above the largest differs between torch's devices and
versions: saturation, infinity or NaN. Clamped first, the codes are the same everywhere.
"""

from __future__ import annotations

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2  # arXiv:2209.05433, table 1

LARGEST = {E4M3: 448.0, E5M2: 57344.0}
# The midpoint between the largest and the number that would follow: what is above was not rounded, but clipped.
_CLIPPED_ABOVE = {E4M3: 464.0, E5M2: 61440.0}
# Half of the smallest subnormal, 2^-9 and 2^-16: it and what is below rounds to zero (ties to even).
_ZERO_BELOW = {E4M3: 2.0**-10, E5M2: 2.0**-17}


def encode(scaled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest FP8 number of each element, ties to even; the largest for what is above it. NaN stays NaN.

    Args:
        scaled: numbers divided by their scale, fp32, any shape.
        dtype: E4M3 or E5M2.
    """
    largest = LARGEST[dtype]
    return scaled.clamp(-largest, largest).to(dtype)


def count(scaled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `encode` lost: int64 `[3]` of elements that were clipped, that became zero (underflow), and that were not zero.

    Numbers that round to the largest one are not clipped.
    """
    size = scaled.abs()
    nonzero = torch.count_nonzero(size)
    small = torch.count_nonzero(size <= _ZERO_BELOW[dtype])
    clipped = torch.count_nonzero(size >= _CLIPPED_ABOVE[dtype])
    return torch.stack([clipped, small - (scaled.numel() - nonzero), nonzero])
