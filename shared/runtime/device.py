"""The device of a process: its GPU, or the CPU with `cuda_on_cpu`."""

from __future__ import annotations

import os

import torch

from shared.runtime import cuda_on_cpu


def select_device() -> torch.device:
    """The device of this process; call it before building a Megatron-Core model.

    With CUDA: the GPU of `LOCAL_RANK`; torch stays unmodified. Without CUDA: the CPU; `cuda_on_cpu` is installed.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    cuda_on_cpu.install()
    return torch.device("cpu")
