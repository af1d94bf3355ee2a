"""Log lines and progress on stderr: a bar on a terminal, a line every 10 seconds elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

_LINE_EVERY = 10.0  # seconds between progress lines without a terminal


def log(message: str) -> None:
    """Print one line to stderr, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(total: int, unit: str, description: str) -> Iterator[Callable[[int], None]]:
    """Show progress to `total` units ("bytes" with binary prefixes); yields `advance(amount)`."""
    if os.environ.get("RANK", "0") != "0":
        yield lambda amount: None
    elif sys.stderr.isatty():
        with _bar(total, unit, description) as advance:
            yield advance
    else:
        yield _lines(total, unit, description)


@contextlib.contextmanager
def _bar(total: int, unit: str, description: str) -> Iterator[Callable[[int], None]]:
    from rich import progress as rich
    from rich.console import Console

    amount = (
        (rich.DownloadColumn(binary_units=True), rich.TransferSpeedColumn())
        if unit == "bytes"
        else (rich.MofNCompleteColumn(), rich.TextColumn(unit))
    )
    columns = (rich.TextColumn(description), rich.BarColumn(), *amount, rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)


def _lines(total: int, unit: str, description: str) -> Callable[[int], None]:
    done, last_line = 0, time.monotonic()

    def advance(amount: int) -> None:
        nonlocal done, last_line
        done += amount
        if time.monotonic() - last_line >= _LINE_EVERY:
            last_line = time.monotonic()
            log(f"{description}: {quantity(done, unit)} of {quantity(total, unit)} ({done / max(total, 1):.0%})")

    return advance


def quantity(amount: float, unit: str) -> str:
    """Format a count with its unit; bytes with a binary prefix."""
    if unit != "bytes":
        return f"{amount:,.0f} {unit}"
    for prefix in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {prefix}" if prefix == "B" else f"{amount:.1f} {prefix}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def abbreviated(names: Sequence[str]) -> str:
    """The first name and the number of further names."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
