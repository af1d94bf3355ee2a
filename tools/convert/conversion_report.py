"""Log lines of a conversion: the plan with its peak memory, and the result."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy import blocks, operations
from shared.console import quantity

_BASE = 12 << 20  # bytes: stacks, malloc arenas, the metadata written last
_NUMPY = 32 << 20  # bytes of numpy, imported for transposes and casts only


def peak_memory(workers: int, *, transposes: bool, casts: bool, per_worker: int = 0) -> int:
    """Upper bound of the memory of a conversion in bytes: this process as it is, and its threads.

    Args:
        workers: threads.
        transposes: whether tensors are transposed: a strip before and after.
        casts: whether numbers change their type: a block before, after and in fp32.
        per_worker: further bytes of each thread.
    """
    each = blocks.BLOCK * (1 + 2 * operations.STRIP * transposes + 6 * casts) + per_worker
    process = _resident() * 17 // 16  # the plan of a file is made when the file is begun: 1/16 for those to come
    numpy = _NUMPY if (transposes or casts) and "numpy" not in sys.modules else 0
    return process + _BASE + workers * each + numpy


def _resident() -> int:
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def plan_line(command: str, architecture: Architecture, files: int, size: int, workers: int, memory: int) -> str:
    """The line before the copy."""
    return (
        f"{command}: {architecture.family}, {architecture.num_layers} layers, {quantity(size, 'bytes')} in "
        f"{files} file{'s' * (files != 1)}; {workers} worker{'s' * (workers != 1)}, at most {quantity(memory, 'bytes')} of memory"
    )


def result_line(target: Path, size: int, seconds: float) -> str:
    """The line after the copy."""
    rate = size / 1e6 / max(seconds, 1e-9)
    return f"{target}: {quantity(size, 'bytes')} in {seconds:.1f} s, {rate:.0f} MB/s"


def abbreviated(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
