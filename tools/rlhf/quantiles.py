"""Quantiles of rewards and lengths, as metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

PERCENTILES = (10, 50, 90)


def quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """NAME_p10, NAME_p50 and NAME_p90 of values, at least one: the smallest value that so many per cent do not exceed."""
    ordered = sorted(values)
    return {f"{name}_p{each}": ordered[max(math.ceil(each * len(ordered) / 100) - 1, 0)] for each in PERCENTILES}
