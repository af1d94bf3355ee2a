"""Runs a stage; measures time and memory of its process tree, across interrupted runs. Standard library only (Linux)."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
PERIOD = 0.25  # seconds between two samples of the process tree
LINE_EVERY = 5.0  # seconds between two writes of the record while a stage runs


@dataclass(kw_only=True)
class Measured:
    """Cost of a stage, summed over its runs: interrupted runs count, runs of a finished stage do not."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Time of all cores, user and system: on a busy machine, what the stage would take alone."""
    peak_bytes: int = 0
    """Peak sum of the processes' resident memory; shared pages count once per process."""
    finished: bool = False


class Record:
    """`demo.json`: the cost of each stage, updated while it runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._running = content.pop("running", None)
        self.stages = {name: Measured(**values) for name, values in content.get("stages", {}).items()}

    def write(self, running: list[int] | None = None) -> None:
        """Replace the file atomically."""
        stages = {name: asdict(measured) for name, measured in self.stages.items()}
        beside = self._path.with_name(self._path.name + ".new")
        beside.write_text(json.dumps({"stages": stages, "running": running}, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._path)

    def made_again(self, name: str) -> None:
        """Forget what a stage cost that was finished, and whose output is gone."""
        if self.stages.get(name, Measured()).finished:
            del self.stages[name]

    def wait_for_earlier(self) -> None:
        """Wait for the last stage of a killed demo: the kernel sent it SIGTERM, and it may still be saving."""
        if self._running is None:
            return
        pid, started = self._running
        deadline = time.monotonic() + 120
        while _started(pid) == started:
            if time.monotonic() > deadline:
                raise SystemExit(f"process {pid} of an earlier demo still runs; stop it first")
            time.sleep(0.2)


def run(name: str, command: Sequence[str], record: Record) -> int:
    """Run a stage and record its cost. Returns its exit code.

    A finished stage exits at once when run again; its recorded cost is unchanged.
    """
    earlier = record.stages.get(name, Measured())
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=stop_with_parent)  # noqa: PLW1509 -- no threads here
    began = last_line = time.monotonic()
    cores_began = _cores()
    peak = 0
    try:
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            now = time.monotonic()
            if now - last_line > LINE_EVERY and not earlier.finished:
                last_line = now
                record.stages[name] = _added(earlier, now - began, 0.0, peak, finished=False)
                record.write(running=[process.pid, _started(process.pid)])
            time.sleep(PERIOD)
    finally:  # interrupted: let the stage save first
        stop(process)
        if not earlier.finished:
            finished = process.returncode == 0
            took = time.monotonic() - began
            record.stages[name] = _added(earlier, took, _cores() - cores_began, peak, finished=finished)
        record.write()
    return process.returncode


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a process: SIGTERM, and a minute to save."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tree_bytes(root: int) -> int:
    """Resident memory of a process tree in bytes."""
    children: dict[int, list[int]] = {}
    session: list[int] = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
            if int(fields[3]) == root:  # an orphan of the same session
                session.append(int(entry))
    found: set[int] = set()
    waiting = [root, *session]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return sum(_resident(pid) for pid in found)


def _added(earlier: Measured, seconds: float, cpu_seconds: float, peak: int, *, finished: bool) -> Measured:
    return Measured(
        seconds=earlier.seconds + seconds,
        cpu_seconds=earlier.cpu_seconds + cpu_seconds,
        peak_bytes=max(earlier.peak_bytes, peak),
        finished=finished,
    )


def _cores() -> float:
    """Seconds of all cores, of the processes that ended and were waited for, and of those that they waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on: state, parent, group, session, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot: a pid alone may be reused."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else None


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def stop_with_parent() -> None:
    """In the child: have the kernel send SIGTERM when the parent dies (Linux: PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
