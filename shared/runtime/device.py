"""Where a process computes: its own CUDA device, or the CPU posing as one for Megatron-Core."""

from __future__ import annotations

import os

import torch

from shared.runtime import cpu_host


def prepare() -> torch.device:
    """The device of this process; call it before a Megatron-Core model is built.

    With CUDA present nothing of torch is touched: the process takes the GPU of its `LOCAL_RANK`. Without CUDA
    the CPU host layer is installed, once per process, and the CPU is returned.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    cpu_host.install()
    return torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend that moves tensors of `prepare()`'s device."""
    return "nccl" if torch.cuda.is_available() else "gloo"
