"""torch.distributed's default process group."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def join_world() -> None:
    """Initialise the default process group, unless it is.

    The world is that of `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`; without `RANK`, one process. NCCL with CUDA,
    else gloo.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
