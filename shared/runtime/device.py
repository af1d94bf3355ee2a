"""The device of a process: its GPU, or the CPU with `cpu_host`."""

from __future__ import annotations

import os

import torch

from shared.runtime import cpu_host


def prepare() -> torch.device:
    """The device of this process; call it before building a Megatron-Core model.

    With CUDA: the GPU of `LOCAL_RANK`; torch stays unmodified. Without CUDA: the CPU; `cpu_host` is installed.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    cpu_host.install()
    return torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend of `prepare()`'s device."""
    return "nccl" if torch.cuda.is_available() else "gloo"
