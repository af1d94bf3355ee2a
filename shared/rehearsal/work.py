"""What a rank computes: products, bytes, operations, and the least time that they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from shared.rehearsal.speed import MATRIX_SHARE, MEMORY_SHARE, OPERATION_SECONDS, Speed

_aten = torch.ops.aten
_NO_WORK = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "set_", "resize_"}


@dataclass(kw_only=True)
class Counted:
    """The work of a phase."""

    flops: int = 0  # of matrix products and attention; causal attention counts in full, as it does in torch
    bytes: int = 0  # that operations read and write
    operations: int = 0
    seconds: float = 0.0  # the sum over operations of the roofline's time


class Work:
    """Counts the operations of a process on a GPU of this speed, by phase."""

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self.phases: dict[str, Counted] = {}

    def add(self, phase: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> None:
        """Count an operation, with its arguments and results."""
        name = func._opname
        if func.is_view or func.namespace == "c10d" or name in _NO_WORK:
            return
        moved = _bytes(args) + _bytes(kwargs.values()) + _bytes((found,))
        if not moved:
            return
        flops = flops_of(func, args, kwargs, found)
        peak = self._speed.matrix_fp8 if name.startswith("_scaled_") else self._speed.matrix
        counted = self.phases.setdefault(phase, Counted())
        counted.flops += flops
        counted.bytes += moved
        counted.operations += 1
        counted.seconds += max(
            flops / (MATRIX_SHARE * peak), moved / (MEMORY_SHARE * self._speed.memory), OPERATION_SECONDS
        )


def flops_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> int:
    """Floating-point operations of a matrix product or of attention; 0 of anything else. By torch's formulas, and one of ours."""
    packet = func._overloadpacket
    if packet in (_aten._grouped_mm, _aten._scaled_grouped_mm):
        return _grouped(*args[:2])
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=found)) if formula else 0


def _grouped(x: torch.Tensor, y: torch.Tensor) -> int:
    """Rows in groups `[T, K]` times `[G, K, N]`; or `[M, T]` times `[T, N]`, a product for each group of T."""
    return 2 * x.shape[0] * x.shape[1] * y.shape[-1]


def _bytes(values: Any) -> int:
    """Of tensors on a GPU, in lists too."""
    total = 0
    for each in values:
        if isinstance(each, torch.Tensor):
            total += each.numel() * each.element_size() if each.is_cuda else 0
        elif isinstance(each, list | tuple):
            total += _bytes(each)
    return total
