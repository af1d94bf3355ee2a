"""What a rank is doing, for the process that watches it (watch.py): the launcher, or a process started here.

A record of a few words, replaced at every phase of the training loop by the thread that trains: a thread of its own would
go on while the training hangs. Without `begin` all calls do nothing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

DIRECTORY = "BATON_PROGRESS"  # set by the launcher: where records and stacks of its ranks are
RECORD = 512  # bytes
STACK_SIGNAL = signal.SIGUSR2

HANG_SECONDS = 50  # the commands' --hang-timeout
FIRST_UPDATE_SECONDS = 600.0  # kernels are compiled, caches filled
LONG_SECONDS = 1800.0  # opening, loading, saving: as long as the collectives of the others may wait
UPDATES = 10.0  # an update may take so many times the median of the last ones
_REMEMBERED = 20  # updates

_ROOT = Path(__file__).parents[2]


class _Progress:
    """The record of this process."""

    def __init__(self, timeout: float, first_update: float) -> None:
        self.timeout, self.first_update = timeout, first_update
        self.thread = f"0x{threading.get_ident():016x}"  # as in a stack
        self.prefix = ""
        self.phases = 0  # passed; every rank passes the same
        self.beats = 0
        self.phase, self.limit = "", 0.0
        self.seconds: list[float] = []  # of the last updates
        self.watcher: subprocess.Popen[bytes] | None = None
        rank = os.environ.get("RANK", "0")
        directory = os.environ.get(DIRECTORY)
        if directory is None:
            self.record, self.stacks = os.memfd_create("progress"), os.memfd_create("stacks")
        else:
            self.record, self.stacks = (
                os.open(path, os.O_RDWR | os.O_CREAT) for path in paths(Path(directory), int(rank))
            )
        faulthandler.register(STACK_SIGNAL, file=self.stacks, all_threads=True, chain=False)
        if directory is None:
            self._start_watcher(rank)

    def _start_watcher(self, rank: str) -> None:
        own = f"/proc/{os.getpid()}/fd"
        self.watcher = subprocess.Popen(
            [
                *(sys.executable, "-m", "shared.runtime.watch"),
                *(rank, str(os.getpid()), f"{own}/{self.record}", f"{own}/{self.stacks}"),
            ],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            },
            stdin=subprocess.DEVNULL,
        )

    def write(self) -> None:
        self.beats += 1
        record = {
            "thread": self.thread,
            "beat": self.beats,
            "phases": self.phases,
            "phase": self.phase,
            "limit": self.limit,
            "timeout": self.timeout,
        }
        os.pwrite(self.record, json.dumps(record).encode()[:RECORD].ljust(RECORD), 0)

    def update_limit(self) -> float:
        if not self.seconds:
            return max(self.timeout, self.first_update)
        return max(self.timeout, UPDATES * statistics.median(self.seconds))

    def close(self) -> None:
        faulthandler.unregister(STACK_SIGNAL)
        if self.watcher is not None:
            self.watcher.kill()
            self.watcher.wait()
        else:
            os.ftruncate(self.record, 0)  # not watched any more
        os.close(self.record)
        os.close(self.stacks)


_current: _Progress | None = None
_listener: Callable[[str], None] | None = None


def paths(directory: Path, rank: int) -> tuple[Path, Path]:
    """Files of a rank's record and of its stacks."""
    return directory / f"rank-{rank}.progress", directory / f"rank-{rank}.stack"


def begin(timeout: float, *, first_update: float | None = None) -> None:
    """Have this process watched.

    Args:
        timeout: seconds that it may stay within an update, at least; 0: it is not watched.
        first_update: seconds that a phase of the first update may take; by default FIRST_UPDATE_SECONDS.
    """
    global _current
    end()
    if timeout:
        _current = _Progress(timeout, FIRST_UPDATE_SECONDS if first_update is None else first_update)
        at("starting", long=True)


def end() -> None:
    """End the watch."""
    global _current
    if _current is not None:
        _current.close()
    _current = None


def listen(function: Callable[[str], None] | None) -> None:
    """Have `function` called with the name of each phase when it begins; None: no longer."""
    global _listener
    _listener = function


def update(number: int) -> None:
    """An update begins, by reading its data."""
    if _current is not None:
        _current.prefix = f"update {number}: "
    at("reading the data")


def at(phase: str, *, long: bool = False, limit: float | None = None) -> None:
    """The next phase, of an update unless `long`. Every rank passes the same phases.

    Args:
        phase: its name.
        long: it is outside of the updates.
        limit: seconds that it may take; infinite for what has a limit of its own. A rank that is stopped is named all the same.
    """
    if _listener is not None:
        _listener(phase)
    if _current is None:
        return
    if long:
        _current.prefix = ""
    _current.phases += 1
    _current.phase = f"{_current.prefix}{phase}"
    if limit is None:
        limit = max(UPDATES * _current.timeout, LONG_SECONDS) if long else _current.update_limit()
    _current.limit = limit
    _current.write()


def beat() -> None:
    """Something within the phase is done: a micro batch."""
    if _current is not None:
        _current.write()


def updated(seconds: float) -> None:
    """An update took so long."""
    if _current is not None:
        _current.seconds = [*_current.seconds[1 - _REMEMBERED :], seconds]
