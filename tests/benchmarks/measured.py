"""Measures a command: wall time, CPU time, peak memory of its process tree."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_EVERY = 0.02  # seconds between two looks at the memory


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a command took."""

    seconds: float
    processor: float  # seconds, of all its processes
    memory: int  # bytes that are its own: anonymous pages, not the files that it has mapped


def measure(words: Sequence[str | Path], first_to_end: bool = False) -> Measured:
    """Run a command to its end; RuntimeError with what it said if it fails.

    `first_to_end`: where the machine's memory is not enough, it is this command that the kernel ends.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started, memory = time.perf_counter(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([str(word) for word in words], stdout=output, stderr=subprocess.STDOUT)
        if first_to_end:
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000", encoding="ascii")
        while process.poll() is None:
            looked = time.perf_counter()
            memory = max(memory, anonymous(tree(process.pid)))
            time.sleep(max(_EVERY, 20 * (time.perf_counter() - looked)))
        seconds = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace")
            raise RuntimeError(f"{' '.join(map(str, words))} ended with {process.returncode}: {said}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds=seconds, processor=processor, memory=memory)


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text(encoding="ascii")
            for child in children.split():
                found += tree(int(child))
    return found


def anonymous(pids: Sequence[int]) -> int:
    """Bytes; what a process shares with those that it forked counts once."""
    file, field = ("status", "RssAnon:") if len(pids) == 1 else ("smaps_rollup", "Pss_Anon:")
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            for line in Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8").splitlines():
                if line.startswith(field):
                    total += int(line.split()[1]) << 10
    return total


def processor(pids: Sequence[int]) -> float:
    """Seconds of processor that running processes have taken so far, in user and kernel mode, all threads."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            # behind the name in brackets, which may have any character; fields 14 and 15 of proc_pid_stat(5)
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
