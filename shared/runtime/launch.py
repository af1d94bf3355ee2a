"""Launcher of a training command's worker processes on one machine.

On a cluster torchrun or Slurm launches the workers, and sets `RANK`. On one machine torchrun has three drawbacks: it kills
workers half a minute after a signal, in the middle of saving; it loses their exit codes; its import costs seconds and
hundreds of MB.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from shared.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, UserError
from shared.runtime.parent_death import die_with_parent
from shared.runtime.progress import DIRECTORY
from shared.runtime.watch import Watch, Watched

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # for the other workers after a failure: they hang in collectives
SAVING_SECONDS = 60.0  # for the other workers after one has saved and stopped on a signal
SHOWN_LINES = 60  # of a failed worker's output


_LAUNCHED = "BATON_LAUNCHED"

# World sizes set by launchers that do not set RANK.
_TASKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def launch(processes: int | None) -> int | None:
    """Run this command in `processes` worker processes and wait for them; None: the launcher's world size, else 1.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP are forwarded to every worker. After a failure the other workers are killed within
    seconds, and the failed worker's output is shown; the output of ranks above 0 is shown only then. Workers die with
    this process, even after SIGKILL. A worker that writes its progress (progress.py) and hangs is named with its stack, and
    all are killed.

    Returns:
        None in a worker or with one process: the caller does the work itself. Otherwise the exit code of the job: 0, or
        that of the first failed worker (1 if killed by a signal, or if one hangs). Workers that had ended with 0 before it
        are named.

    Raises:
        UserError: `processes` is below 1, or differs from the world size of a cluster's launcher.
    """
    if processes is not None and processes < 1:
        raise UserError(f"--processes must be at least 1, not {processes}")
    if "RANK" in os.environ:
        started = os.environ.get("WORLD_SIZE")
        if processes is not None and started != str(processes):
            raise UserError(
                f"--processes {processes}, but the launcher of this job started {started} workers; leave --processes out"
            )
        return None
    for name in _TASKS:
        if (tasks := os.environ.get(name, "1")) != "1":
            raise UserError(
                f"{tasks} tasks of this job run the same command ({name}), and none has RANK; start it with torchrun, or "
                "as containers/slurm does"
            )
    if processes is None or processes == 1:
        return None
    with tempfile.TemporaryDirectory(prefix="workers-") as directory:
        outputs = [Path(directory) / f"rank-{rank}.log" for rank in range(processes)]
        workers = _start(processes, outputs)
        watch = Watch([Watched.of(rank, worker.pid, Path(directory)) for rank, worker in enumerate(workers)])
        # Signals ignored by the caller (SIGHUP under nohup) stay ignored.
        forwarded = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, _Forward(workers)) for number in forwarded}
        try:
            return _wait(workers, outputs, watch)
        finally:
            _kill(workers)
            for number, handler in previous.items():
                signal.signal(number, handler)


def visible_gpus() -> int:
    """GPUs this process may use, found without importing torch."""
    devices = len([node for node in Path("/dev").glob("nvidia*") if node.name.removeprefix("nvidia").isdigit()])
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return devices if chosen is None else min(devices, len([part for part in chosen.split(",") if part]))


def started_by_launch() -> bool:
    """Whether this process is a worker of `launch`, which has checked the command's inputs."""
    return _LAUNCHED in os.environ


def _start(processes: int, outputs: Sequence[Path]) -> list[subprocess.Popen[bytes]]:
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    common = {
        "OMP_NUM_THREADS": str(threads),  # each worker's share of the cores; the default is all
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # for Megatron-Core: communication kernels start before computation
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "GLOO_SOCKET_IFNAME": "lo",  # the host name may not resolve
        _LAUNCHED: "1",
        DIRECTORY: str(outputs[0].parent),
    }
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank, path in enumerate(outputs):
            with open(path, "wb") as output:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, *sys.argv],
                        env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=None if rank == 0 else output,
                        stderr=None if rank == 0 else output,
                        start_new_session=True,  # Ctrl-C reaches a worker once, by forwarding
                        # After SIGKILL of the launcher no worker may go on writing checkpoints.
                        preexec_fn=functools.partial(die_with_parent, os.getpid()),  # noqa: PLW1509 -- a single thread
                    )
                )
    except BaseException:
        _kill(workers)
        raise
    return workers


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class _Forward:
    """Signal handler: forwards every signal to the workers."""

    def __init__(self, workers: Sequence[subprocess.Popen[bytes]]) -> None:
        self.workers = workers

    def __call__(self, number: int, frame: FrameType | None) -> None:
        for worker in self.workers:
            worker.send_signal(number)  # no-op for an ended worker


def _wait(workers: Sequence[subprocess.Popen[bytes]], outputs: Sequence[Path], watch: Watch) -> int:
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            break
        if all(code == 0 for code in codes):
            return 0
        if report := watch.hanging():
            sys.stderr.write(report)
            return EXIT_FAILED
        time.sleep(POLL_SECONDS)

    first = failed[0]
    code = workers[first].returncode
    left = [rank for rank, code in enumerate(codes) if code == 0]
    deadline = time.monotonic() + (SAVING_SECONDS if code == EXIT_INTERRUPTED else GRACE_SECONDS)
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    hanging = [rank for rank, worker in enumerate(workers) if worker.poll() is None]
    if code == EXIT_INTERRUPTED:
        failed_otherwise = [w.returncode for w in workers if w.returncode not in (0, EXIT_INTERRUPTED, None)]
        if not hanging and not failed_otherwise:
            return EXIT_INTERRUPTED
        first = next(rank for rank, w in enumerate(workers) if w.returncode not in (0, EXIT_INTERRUPTED))
        code = workers[first].returncode
    if code == EXIT_USAGE and workers[0].returncode == code:
        first = 0  # the same UserError on every rank; rank 0 has printed it
    _report(first, code, outputs[first])
    for rank in left:  # the failed one may only have waited for it
        _report(rank, 0, outputs[rank])
    return EXIT_FAILED if code is None or code < 0 else code


def _report(rank: int, code: int | None, output: Path) -> None:
    if rank != 0:  # rank 0 writes to the terminal
        lines = output.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        sys.stderr.write("".join(f"[rank {rank}] {line}\n" for line in lines))
    if code is None:
        sys.stderr.write(f"worker {rank} did not end after the others had saved and stopped\n")
    elif code == 0:
        sys.stderr.write(
            f"worker {rank} had ended before that with exit code 0: if it was not at its end, something called sys.exit() "
            "or os._exit() in it\n"
        )
    elif code < 0:
        sys.stderr.write(
            f"worker {rank} was killed by {signal.Signals(-code).name}; if nobody sent it, memory ran out: "
            "use a smaller --micro-batch-size\n"
        )


def _kill(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
    for worker in workers:
        worker.wait()
