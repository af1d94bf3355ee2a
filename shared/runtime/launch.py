"""Starts the worker processes of a training command on this machine, and answers for them.

torchrun is left to clusters (a worker started by it, or by Slurm, finds `RANK` set). On one machine it would kill
workers half a minute after a signal, in the middle of saving, and lose their exit codes; and importing it costs
seconds and hundreds of MB for a process that only waits.
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

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # for the others, after one worker has failed: they wait for it in vain
SAVING_SECONDS = 60.0  # for the others, after one worker has saved and stopped as told
SHOWN_LINES = 60  # of a failed worker's output


def launch(processes: int) -> int | None:
    """Runs this very command again in `processes` worker processes and waits for them.

    Returns None where there is nothing to start, and the caller is to do the work itself: in a worker, or when
    one process is enough. Otherwise returns the exit code of the job: 0, or that of the worker that failed first
    (1 when a signal killed it). SIGTERM, SIGINT, SIGUSR1 and SIGHUP go on to every worker. One dead worker ends
    the others within seconds, and its output is shown. Workers die with this process, even by SIGKILL.

    Workers other than rank 0 write to files that are shown only when they fail. Raises `UserError` when
    `processes` is below 1, or differs from the number of workers that a cluster's launcher has started.
    """
    if processes < 1:
        raise UserError(f"--processes must be at least 1, not {processes}")
    if "RANK" in os.environ:
        started = os.environ.get("WORLD_SIZE")
        if processes != 1 and started != str(processes):  # 1 is the flag's default: a cluster's launcher decides
            raise UserError(f"--processes {processes}, but the launcher of this job started {started} workers")
        return None
    if processes == 1:
        return None
    with tempfile.TemporaryDirectory(prefix="workers-") as directory:
        outputs = [Path(directory) / f"rank-{rank}.log" for rank in range(processes)]
        workers = _start(processes, outputs)
        # What the caller ignores (SIGHUP under nohup) stays ignored.
        forwarded = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, _Forward(workers)) for number in forwarded}
        try:
            return _wait(workers, outputs)
        finally:
            _kill(workers)
            for number, handler in previous.items():
                signal.signal(number, handler)


def _start(processes: int, outputs: Sequence[Path]) -> list[subprocess.Popen[bytes]]:
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    common = {
        "OMP_NUM_THREADS": str(threads),  # each worker's share of the cores; without it each takes all
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron-Core orders communication before arithmetic by it
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "GLOO_SOCKET_IFNAME": "lo",  # the host's own name need not resolve
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
                        start_new_session=True,  # a terminal's Ctrl-C comes once, from us
                        # A launcher that is killed must leave no worker behind that goes on writing checkpoints.
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
    """A signal handler that passes every signal on."""

    def __init__(self, workers: Sequence[subprocess.Popen[bytes]]) -> None:
        self.workers = workers

    def __call__(self, number: int, frame: FrameType | None) -> None:
        for worker in self.workers:
            worker.send_signal(number)  # does nothing for one that has ended


def _wait(workers: Sequence[subprocess.Popen[bytes]], outputs: Sequence[Path]) -> int:
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            break
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_SECONDS)

    first = failed[0]
    code = workers[first].returncode
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
        first = 0  # all found the same mistake, and rank 0 has told it
    _report(first, code, outputs[first])
    return EXIT_FAILED if code is None or code < 0 else code


def _report(rank: int, code: int | None, output: Path) -> None:
    if rank != 0:  # rank 0 has written to the terminal itself
        lines = output.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        sys.stderr.write("".join(f"[rank {rank}] {line}\n" for line in lines))
    if code is None:
        sys.stderr.write(f"worker {rank} did not end after the others had saved and stopped\n")
    elif code < 0:
        sys.stderr.write(
            f"worker {rank} was killed by {signal.Signals(-code).name}; if nobody sent that, memory ran out: "
            "use a smaller --micro-batch-size\n"
        )


def _kill(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
    for worker in workers:
        worker.wait()
