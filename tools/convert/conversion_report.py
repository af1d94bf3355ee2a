"""Log lines of a conversion: the plan with an upper bound of memory, and the result."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy import blocks, operations
from shared.console import quantity

_BASE = 12 << 20  # bytes: stacks, malloc arenas, the metadata written last
_NUMPY = 32 << 20  # bytes of numpy, imported for transposes and casts only


def peak_memory(workers: int, *, transposes: bool, casts: bool, per_worker: int = 0) -> int:
    """Upper bound of a conversion's memory in bytes: current resident memory plus the threads' buffers.

    Args:
        workers: threads.
        transposes: whether a tensor is transposed; per thread: one strip before, one after.
        casts: whether a dtype changes; per thread: one block before, one after, one in fp32.
        per_worker: additional bytes per thread.
    """
    each = blocks.BLOCK * (1 + 2 * operations.STRIP * transposes + 6 * casts) + per_worker
    process = _resident() * 17 // 16  # a file's plan is made when its copy starts: + 1/16
    numpy = _NUMPY if (transposes or casts) and "numpy" not in sys.modules else 0
    return process + _BASE + workers * each + numpy


def _resident() -> int:
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def plan_line(command: str, architecture: Architecture, files: int, size: int, workers: int, memory: int) -> str:
    """Log line before the copy."""
    return (
        f"{command}: {architecture.family}, {architecture.num_layers} layers, {quantity(size, 'bytes')} in "
        f"{files} file{'s' * (files != 1)}; {workers} worker{'s' * (workers != 1)}, at most {quantity(memory, 'bytes')} of memory"
    )


def result_line(target: Path, size: int, seconds: float) -> str:
    """Log line after the copy."""
    rate = size / 1e6 / max(seconds, 1e-9)
    return f"{target}: {quantity(size, 'bytes')} in {seconds:.1f} s, {rate:.0f} MB/s"
