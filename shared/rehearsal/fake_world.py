"""One rank of a world that is not there, in this process.

The process group is torch's "fake": every collective is answered at once, nothing is sent. Everything here is for a process of
`reexecute`, which does nothing else.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


def before_forking() -> None:
    """Call it before Megatron-Core is imported, which asks for a GPU: a process that has asked the runtime itself cannot fork."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1


def join(rank: int, world: int) -> None:
    """Become `rank` of `world` ranks, on a GPU of its own, in a process that has just been forked."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    torch.compiler.set_stance("force_eager")  # a compiler would launch kernels of its own
    torch.cuda.init()
    # cuDNN's attention has no stub. The flash kernel, chosen next, keeps the same tensors for the backward pass.
    torch.backends.cuda.enable_cudnn_sdp(False)
    _replace_groups()
    if importlib.util.find_spec("megatron"):
        _replace_counting()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)


# Every group that was made in this process, of all ranks: torch's description of it, and its members.
groups: list[tuple[str, tuple[int, ...]]] = []


def _replace_groups() -> None:
    new_group = dist.new_group

    def new_fake_group(*args: Any, **named: Any) -> Any:
        named.pop("pg_options", None)  # NCCL's
        members = args[0] if args else named.get("ranks")
        if named.get("backend") != "gloo" and members is not None:
            groups.append((named.get("group_desc") or "", tuple(members)))
        return new_group(*args, **{**named, "backend": "fake"})

    def all_gather_object(found: list[Any], own: Any, group: Any = None) -> None:
        """The other ranks answer as this one."""
        found[:] = [own] * len(found)

    dist.new_group = new_fake_group
    dist.all_gather_object = all_gather_object


def _replace_counting() -> None:
    """MoE: as many tokens for each expert as there are on average. Counts made on the GPU would be zeros here."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def preprocess(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
        """In place of Megatron-Core's: the same attributes and the same gather."""
        tokens, ranks = len(routing_map) * self.config.moe_router_topk, self.ep_size * self.tp_size
        each = balanced(tokens, self.num_experts)
        mine = each[self.local_expert_indices[0] : self.local_expert_indices[-1] + 1]
        self.num_out_tokens = tokens
        if ranks > 1:
            gather_from_sequence_parallel_region(routing_map.sum(dim=0).long(), group=self.tp_ep_group)
            received = int(mine.sum())
            self.input_splits = each.reshape(self.ep_size, -1).sum(1).tolist()
            self.output_splits = [received] * self.ep_size
            self.output_splits_tp = torch.tensor([received * self.ep_size] * self.tp_size)
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = mine.repeat(ranks, 1)
        return mine * ranks

    MoEAlltoAllTokenDispatcher.preprocess = preprocess


def launch_nothing() -> None:
    """Leave the Triton kernels of the casts to FP8 out: they ask the driver. What they write is allocated by their callers."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton import JITFunction

    from shared.kernels.fp8 import triton_coder, triton_source

    for module in (triton_coder, triton_source):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, _NotLaunched())


class _NotLaunched:
    """A kernel, for any grid."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *given, **named: None


def balanced(tokens: int, experts: int) -> torch.Tensor:
    """`tokens` over `experts`, int64 `[experts]` on the host; the first experts have one more where it does not divide."""
    each = torch.full((experts,), tokens // experts)
    each[: tokens % experts] += 1
    return each
