"""What a conversion says before and after."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy import blocks, operations
from shared.console import quantity

_BESIDES = 12 << 20  # bytes of what is not data: stacks, arenas, the metadata written at the end
_NUMPY = 32 << 20  # bytes that it takes once numbers have to be moved or changed one by one


def peak_memory(workers: int, strips: bool, converts: bool, beside: int = 0) -> int:
    """Bytes of memory that a conversion takes at most: what this process has now, and what the threads will.

    Args:
        workers: threads.
        strips: whether tensors are transposed: a strip, and what it becomes.
        converts: whether numbers change their type: a block of them in both, and in between.
        beside: bytes that each thread holds beside those.
    """
    each = blocks.BLOCK * (1 + 2 * operations.STRIP * strips + 6 * converts) + beside
    plan = _resident() * 17 // 16  # and what is planned only when a file is begun: it grows with the number of tensors
    return plan + _BESIDES + workers * each + (_NUMPY if (strips or converts) and "numpy" not in sys.modules else 0)


def _resident() -> int:
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def plan_lines(command: str, architecture: Architecture, files: int, size: int, workers: int, memory: int) -> str:
    """One line that says what is going to happen."""
    return (
        f"{command}: {architecture.family}, {architecture.num_layers} layers, {quantity(size, 'bytes')} in "
        f"{files} file{'s' * (files != 1)}; {workers} worker{'s' * (workers != 1)}, at most {quantity(memory, 'bytes')} of memory"
    )


def summary(target: Path, size: int, seconds: float) -> str:
    """One line that says what happened."""
    rate = size / 1e6 / max(seconds, 1e-9)
    return f"{target}: {quantity(size, 'bytes')} in {seconds:.1f} s, {rate:.0f} MB/s"
