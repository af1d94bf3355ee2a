"""Run a conversion plan: log it, write this process's files, log the result."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy.operations import FilePlan
from shared.checkpoint.directory.publish import Checks, Publication
from shared.cli import log, progress
from tools.convert.conversion_report import peak_memory, plan_line, result_line

_MAX_WORKERS = 8  # default limit: more threads rarely raise disk throughput


def default_workers() -> int:
    """One thread per processor available to this process, at most 8."""
    return min(len(os.sched_getaffinity(0)), _MAX_WORKERS)


def run_conversion(
    command: str,
    architecture: Architecture,
    out: Publication,
    files: Sequence[FilePlan],
    target: Path,
    *,
    workers: int | None,
    transposes: bool,
    casts: bool,
    checks: Checks,
    memory_per_worker: int = 0,
) -> None:
    """Write this process's share of the files.

    Args:
        command: command name, for the log.
        architecture: the model's architecture.
        out: publication in progress.
        files: all files of the conversion.
        target: the directory to be published.
        workers: threads; None for the default.
        transposes: whether a tensor is transposed.
        casts: whether a dtype or a column order changes.
        checks: returns the checks to run during the copy, given the source files.
        memory_per_worker: bytes per thread in addition to its blocks.
    """
    own_files, workers = out.own_files(files), workers or default_workers()
    size = sum(file.size for file in own_files)
    memory = peak_memory(workers, transposes=transposes, casts=casts, per_worker=memory_per_worker)
    log(plan_line(command, architecture, len(own_files), size, workers, memory))
    started = time.monotonic()
    with progress(size, "bytes", "converting") as advance:
        out.write(files, workers=workers, advance=advance, checks=checks)
    if own_files:
        log(result_line(target, size, time.monotonic() - started))
