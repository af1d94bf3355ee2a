"""A process of a distributed job, and what its ranks compute together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """This process's place in the job."""

    device: torch.device
    rank: int
    world_size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place; the `Reduce` of `tools.rlhf.algorithms.losses`."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank: the same answer on all."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def maximum(self, value: float) -> float:
        """The largest value of all ranks."""
        tensor = torch.tensor(value, device=self.device, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's Python object, on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.sum(torch.zeros(1, device=self.device))
