"""The ranks of a job and their reductions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """This process's device and rank."""

    device: torch.device
    rank: int
    world_size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place; the `Reduce` of `tools.rlhf.algorithms.losses`."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, value: float) -> float:
        """The largest value of all ranks."""
        tensor = torch.tensor(value, device=self.device, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def gather[T](self, values: list[T]) -> list[T]:
        """The values of all ranks, rank by rank; they must be picklable."""
        found: list[list[T]] = [values] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, values)
        return [value for part in found for value in part]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.sum(torch.zeros(1, device=self.device))
