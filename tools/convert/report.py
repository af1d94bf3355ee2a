"""What a conversion says before and after."""

from __future__ import annotations

from pathlib import Path

from shared.checkpoint.blocks import BLOCK
from shared.console import quantity
from shared.model.architecture import Architecture

_INTERPRETER = 60 << 20  # bytes of Python, numpy and this tool at rest
_BLOCKS = 4  # blocks at a time: read, converted, gathered, written


def plan_lines(command: str, architecture: Architecture, files: int, size: int, workers: int) -> str:
    """One line that says what is going to happen."""
    memory = quantity(_INTERPRETER + workers * _BLOCKS * BLOCK, "bytes")
    return (
        f"{command}: {architecture.family}, {architecture.num_layers} layers, {quantity(size, 'bytes')} in "
        f"{files} file{'s' * (files != 1)}; {workers} worker{'s' * (workers != 1)}, about {memory} of memory"
    )


def summary(target: Path, size: int, seconds: float) -> str:
    """One line that says what happened."""
    rate = size / 1e6 / max(seconds, 1e-9)
    return f"{target}: {quantity(size, 'bytes')} in {seconds:.1f} s, {rate:.0f} MB/s"
