"""torch.distributed's default process group."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist

from shared.errors import EXIT_INTERRUPTED

_STOP = {signal.SIGTERM, signal.SIGUSR1}
_POLL_SECONDS = 0.2


def join_world() -> None:
    """Initialise the default process group, unless it is.

    The world is that of `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`; without `RANK`, one process. NCCL with CUDA,
    else gloo. Returns when all ranks have come; SIGTERM or SIGUSR1 before that ends the process with exit code 75.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        with _stopped_by_signals():
            dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Context manager: SIGTERM and SIGUSR1 end the process at once, with exit code 75.

    torch waits for the other ranks outside of Python, for minutes, where no Python signal handler runs. So a thread takes
    the signals.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if signal.sigtimedwait(_STOP, _POLL_SECONDS) is not None:
                print(
                    f"rank {os.environ['RANK']}: stopped by a signal while it waited for the other ranks",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_INTERRUPTED)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)  # the thread inherits it
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
