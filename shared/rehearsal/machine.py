"""GPUs that a rehearsal can play, and the memory of one that a run may use. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from shared.errors import UserError

GpuName = Literal["a100-40", "a100-80", "l40s", "h100-80", "h200", "b200"]
DEFAULT_GPU: GpuName = "h100-80"
MiB, GiB = 2**20, 2**30

# Kept free of what torch allocates: CUDA's context, NCCL's buffers, workspaces of libraries that have no stubs. An allowance, not
# a measurement.
RESERVE = 4 * GiB

_UNITS = {"MiB": MiB, "GiB": GiB, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU."""

    title: str
    memory: int  # bytes, as nvidia-smi lists it
    capability: int  # compute capability times 10
    processors: int  # streaming multiprocessors

    @property
    def usable(self) -> int:
        """Bytes that torch may reserve."""
        return max(self.memory - RESERVE, 0)


# NVIDIA's data sheets; memory as `nvidia-smi --query-gpu=memory.total` lists it.
GPUS: dict[GpuName, Gpu] = {
    "a100-40": Gpu(title="A100 40 GB", memory=40960 * MiB, capability=80, processors=108),
    "a100-80": Gpu(title="A100 80 GB", memory=81920 * MiB, capability=80, processors=108),
    "l40s": Gpu(title="L40S", memory=46068 * MiB, capability=89, processors=142),
    "h100-80": Gpu(title="H100 80 GB", memory=81559 * MiB, capability=90, processors=132),
    "h200": Gpu(title="H200", memory=143771 * MiB, capability=90, processors=132),
    "b200": Gpu(title="B200", memory=183359 * MiB, capability=100, processors=148),
}


def parse_memory(text: str) -> int:
    """Bytes of `80GiB`, `81559MiB`, `80GB`. UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MiB|GiB|MB|GB)", text.strip())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size <= RESERVE:
        raise UserError(
            f"--gpu-memory {text}: give the memory of a GPU with its unit, as 80GiB; more than the "
            f"{RESERVE // GiB} GiB that are kept free for CUDA and NCCL"
        )
    return size
