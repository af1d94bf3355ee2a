"""From amax to scale; amax over ranks that hold parts of a tensor; the history of the delayed recipe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from shared.kernels.fp8.codes import LARGEST

WARM_UP = 16  # updates
_SMALLEST = torch.finfo(torch.float32).tiny  # of scales: below, a division would be by a subnormal or by zero


def amax(x: torch.Tensor, axes: tuple[int, ...], groups: Sequence[ProcessGroup] = ()) -> torch.Tensor:
    """The largest absolute value over `axes`, which stay with size 1; fp32. NaN if there is one; 0 of no elements.

    `groups`: ranks that hold other elements of these axes: collective.
    """
    found: torch.Tensor = x.abs().amax(axes, keepdim=True).float() if x.numel() else _zeros(x, axes)
    if groups:
        found = found.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a MAX of gloo ignores NaN on some ranks
        for group in groups:
            all_reduce(found, ReduceOp.MAX, group=group)
    return found


def _zeros(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    return torch.zeros(shape, dtype=torch.float32, device=x.device)


def scale_of(amax: torch.Tensor, dtype: torch.dtype, *, power_of_two: bool) -> torch.Tensor:
    """`amax / largest number of dtype`, in fp32; 1 for an amax of 0. A code times the scale is the number.

    Args:
        amax: fp32, any shape.
        dtype: of the codes.
        power_of_two: round up to a power of two: the largest code is then between a half of the largest number and it.
    """
    scale = amax / LARGEST[dtype]
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(amax > 0, scale.clamp(min=_SMALLEST), torch.ones_like(scale))


class History:
    """Amax of the last updates of one tensor, newest first, as TransformerEngine's `amax_history`.

    One entry per update: the maximum over its micro batches. On the host, so that no GPU is waited for.

    While it has fewer than WARM_UP updates (or `length`), it gives no amax: activations grow fastest then, and a scale of
    earlier updates would clip them. TransformerEngine starts with a scale of 1.
    """

    def __init__(self, length: int) -> None:
        """`length`: updates that are kept."""
        self.length = length
        self.values: list[float] = []  # numbers of fp32
        self.highest: float | None = None  # None: too few updates yet

    def append(self, amax: float) -> None:
        """Add the amax of an update; a zero, of an expert without tokens, says nothing and is left out."""
        if amax > 0:
            self.restore([amax, *self.values][: self.length])

    def restore(self, values: Sequence[float]) -> None:
        """Take the values of a checkpoint; of a longer history the newest."""
        self.values = list(values)[: self.length]
        self.highest = max(self.values) if len(self.values) >= min(self.length, WARM_UP) else None
