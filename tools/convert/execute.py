"""Carries out the plan of a conversion, whichever form it is into."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy.operations import FilePlan
from shared.checkpoint.directory.publish import Checks, Publication
from shared.cli import log, progress
from tools.convert.report import peak_memory, plan_lines, summary

_MOST = 8  # threads; more than these a disk seldom keeps busy


def default_workers() -> int:
    """A thread for each processor that this process may use, to a limit."""
    return min(len(os.sched_getaffinity(0)), _MOST)


def execute(
    command: str,
    architecture: Architecture,
    out: Publication,
    files: Sequence[FilePlan],
    target: Path,
    *,
    workers: int | None,
    strips: bool,
    converts: bool,
    checks: Checks,
    beside: int = 0,
) -> None:
    """Say what is going to happen, write this process's files, and say what happened.

    Args:
        command: its name.
        architecture: of the model.
        out: where to.
        files: all of the conversion.
        target: the directory to be published.
        workers: threads; None for as many as suit the machine.
        strips: whether tensors are transposed.
        converts: whether numbers change their type, or columns their place.
        checks: given the files that are read, what is to be checked meanwhile.
        beside: bytes of memory that a thread holds beside its blocks.
    """
    mine, workers = out.mine(files), workers or default_workers()
    size = sum(file.size for file in mine)
    memory = peak_memory(workers, strips, converts, beside)
    log(plan_lines(command, architecture, len(mine), size, workers, memory))
    started = time.monotonic()
    with progress(size, "bytes", "converting") as advance:
        out.write(files, workers=workers, advance=advance, checks=checks)
    if mine:
        log(summary(target, size, time.monotonic() - started))
