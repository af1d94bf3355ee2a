"""Runs the stages of a demo one after the other, with a record of their cost. Standard library only."""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import measure
import metrics
from stages import Stage

ROOT = Path(__file__).resolve().parents[1]


def parser(description: str | None, *, work: str) -> argparse.ArgumentParser:
    """The flags of every demo."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--work", type=Path, default=Path(work), help="directory for everything (default: %(default)s)")
    result.add_argument("--until", metavar="STAGE", help="stop after this stage, named as in the table")
    return result


def settle(work: Path) -> Path:
    """Go to the repository's root; `work` as in the printed commands, which can be copied: relative to the root if in it."""
    work = work.resolve()
    work = work.relative_to(ROOT) if work.is_relative_to(ROOT) else work
    os.chdir(ROOT)
    return work


def drive(
    parser: argparse.ArgumentParser, every: list[Stage], work: Path, until: str | None, verdict: Callable[[Path], int]
) -> int:
    """Run the unfinished stages; print the table and the verdict. Returns the exit code."""
    if until and until not in [stage.name for stage in every]:
        parser.error(f"--until {until}: no such stage; one of: {', '.join(stage.name for stage in every)}")
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ["HF_HUB_OFFLINE"] = "1"  # no downloads
    for told in (signal.SIGTERM, signal.SIGINT):
        signal.signal(told, lambda *_: sys.exit(75))
    with (work / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"demo: another demo is at work in {work}", file=sys.stderr)
            return 2
        record = measure.Record(work / "demo.json")
        record.wait_for_earlier()
        for stage in every:
            code = run(stage, record)
            if code:
                print(
                    f"demo: `{stage.name}` ended with exit code {code}; run the same command again to resume",
                    file=sys.stderr,
                )
                if code == 2:
                    print(f"demo: if its sizes were changed since, remove {work} to start afresh", file=sys.stderr)
                return code
            if stage.name == until:
                return 0
        print(table(every, record))
        return verdict(work)


def run(stage: Stage, record: measure.Record) -> int:
    """Print and run one stage."""
    print(f"\n=== {stage.name}\n$ {shlex.join(stage.command)}", flush=True)
    if not stage.output.exists():
        record.made_again(stage.name)
    began = time.monotonic()
    code = measure.run(stage.name, stage.command, record)
    if code == 0:
        print(f"=== {stage.name}: {stage.says() or 'done'} ({time.monotonic() - began:.0f} s)", flush=True)
    return code


def table(every: list[Stage], record: measure.Record) -> str:
    """Time by the clock and of all cores, memory, size and result of every stage."""
    rows = [("stage", "time", "of cores", "peak memory", "on disk", "result")]
    for stage in every:
        took = record.stages[stage.name]
        rows.append(
            (
                stage.name,
                f"{took.seconds:.0f} s",
                f"{took.cpu_seconds:.0f} s",
                f"{took.peak_bytes / 2**20:.0f} MiB",
                _size(metrics.size_on_disk(stage.output)),
                stage.says(),
            )
        )
    costs = [record.stages[stage.name] for stage in every]
    total, of_cores = sum(cost.seconds for cost in costs), sum(cost.cpu_seconds for cost in costs)
    largest = max(cost.peak_bytes for cost in costs)
    rows.append(("all", f"{total / 60:.1f} min", f"{of_cores / 60:.1f} min", f"{largest / 2**20:.0f} MiB", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        "  ".join(
            cell.rjust(width) if column in (1, 2, 3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join(["", lines[0], rule, *lines[1:-1], rule, lines[-1], ""])


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
