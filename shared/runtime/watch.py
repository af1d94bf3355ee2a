"""Watch over ranks that write what they do (progress.py): which one hangs, where, and since when.

`python -m shared.runtime.watch RANK PID RECORD STACKS` watches its parent: a rank without Baton's launcher.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from shared.runtime.parent_death import die_with_parent
from shared.runtime.progress import RECORD, STACK_SIGNAL, paths

LOOK_SECONDS = 0.25
STACK_SECONDS = 5.0
STACK_LINES = 40
WAITING_SECONDS = 5.0  # more for a rank that waits for another one, so that the other one's watcher speaks first
_POOL = "/concurrent/futures/"
_THREAD = "  a thread:"
# Frames in which a rank waits for another one.
_WAITING = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication")


@dataclass(kw_only=True)
class Watched:
    """A rank."""

    rank: int
    process: int
    record: Path
    stacks: Path
    said: dict[str, Any] | None = None  # its last record
    silent: float = 0.0  # seconds that the watcher has seen it

    @classmethod
    def of(cls, rank: int, process: int, directory: Path) -> Self:
        """A worker of the launcher."""
        record, stacks = paths(directory, rank)
        return cls(rank=rank, process=process, record=record, stacks=stacks)

    def look(self, elapsed: float) -> None:
        """Read the record. It is empty before the first phase and after the last."""
        try:
            with self.record.open("rb") as file:
                found = json.loads(file.read(RECORD))
        except (OSError, ValueError):
            found = None
        self.silent = self.silent + elapsed if found == self.said else 0.0
        self.said = found

    def stopped(self) -> bool:
        """Whether it is stopped, by SIGSTOP or a debugger."""
        try:
            state = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state in "Tt"

    def overdue(self) -> bool:
        said = self.said
        if said is None or self.silent <= said["timeout"]:
            return False
        return self.silent > said["limit"] or self.stopped()

    def ask_for_stack(self) -> None:
        os.kill(self.process, STACK_SIGNAL)
        os.kill(self.process, signal.SIGCONT)  # for one that is stopped

    def stack(self) -> list[str]:
        """Lines of the thread that trains, innermost frame first; if it waits for a thread of a pool, theirs, too."""
        try:
            written = self.stacks.read_text(errors="replace")
        except OSError:
            return []
        threads: dict[str, list[str]] = {}  # header to frames
        for line in written.splitlines():
            if line.startswith(" "):
                threads[list(threads)[-1]].append(line)
            elif line.strip():
                threads[line] = []
        name = str((self.said or {}).get("thread"))
        trains = next((frames for header, frames in threads.items() if name in header), [])
        lines = trains[:STACK_LINES]
        if any(_POOL in frame for frame in trains):
            for frames in threads.values():
                if frames is not trains and not _idle(frames):
                    lines += [_THREAD, *frames[:STACK_LINES]]
        return lines

    def describe(self, stopped: bool) -> str:
        said = self.said or {}
        how = "; it is stopped, by SIGSTOP or a debugger" if stopped else ""
        return (
            f"rank {self.rank} hangs: for {self.silent:.0f} s in '{said.get('phase')}', which may take "
            f"{said.get('timeout' if stopped else 'limit', 0):.0f} s{how} (--hang-timeout)"
        )


class Watch:
    """A watch over ranks of one machine.

    Time in which the watcher itself does not run (Ctrl-Z, a suspended job) is not counted.
    """

    def __init__(self, ranks: Sequence[Watched]) -> None:
        self._ranks = ranks
        self.waiting = False  # whether all ranks reported wait for another one
        self._looked = time.monotonic()

    def hanging(self) -> str | None:
        """Called often: the ranks that hang with their stacks, in lines; None if there is none."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return None
        elapsed, self._looked = min(now - self._looked, 2 * LOOK_SECONDS), now
        for rank in self._ranks:
            rank.look(elapsed)
        return self._report() if any(rank.overdue() for rank in self._ranks) else None

    def _report(self) -> str:
        stopped = [rank for rank in self._ranks if rank.stopped()]
        talking = [rank for rank in self._ranks if rank.said is not None]
        # Ranks that wait for another one have come further than it, or as far.
        least = min(rank.said["phases"] for rank in talking if rank.said)
        suspects = stopped or [rank for rank in talking if rank.said and rank.said["phases"] == least]
        for rank in suspects:
            rank.ask_for_stack()
        deadline, before = time.monotonic() + STACK_SECONDS, None
        while time.monotonic() < deadline:
            stacks = [rank.stack() for rank in suspects]
            if all(stacks) and stacks == before:  # they are written line by line
                break
            before = stacks
            time.sleep(LOOK_SECONDS)
        busy = [rank for rank in suspects if not any(_waits(line) for line in rank.stack())]
        self.waiting = not busy
        lines = []
        for rank in busy or suspects:
            lines.append(rank.describe(any(rank is other for other in stopped)))
            lines += [f"[rank {rank.rank}] {line}" for line in rank.stack()]
        return "".join(f"{line}\n" for line in lines)


def _idle(frames: list[str]) -> bool:
    """Whether a thread waits for work."""
    return not frames or any(place in frames[0] for place in (_POOL, "/threading.py", "/queue.py", "/selectors.py"))


def _waits(line: str) -> bool:
    return any(place in line for place in _WAITING)


def main(rank: int, process: int, record: str, stacks: str) -> None:
    """Watch the parent; kill it when it hangs. Its launcher (torchrun, Slurm) then ends the job."""
    die_with_parent(process)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):  # the parent's
        signal.signal(number, signal.SIG_IGN)
    watch = Watch([Watched(rank=rank, process=process, record=Path(record), stacks=Path(stacks))])
    while (report := watch.hanging()) is None:
        time.sleep(LOOK_SECONDS)
    if watch.waiting:
        time.sleep(WAITING_SECONDS)
    sys.stderr.write(report)
    sys.stderr.flush()
    os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
