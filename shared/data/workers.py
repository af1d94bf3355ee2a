"""Ordered map over worker processes. Results do not depend on the number of processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from shared.errors import StageError
from shared.runtime.parent_death import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    setup: Callable[..., None],
    setup_arguments: tuple[object, ...] = (),
) -> Generator[Result]:
    """Yield `work(item)` for every item, in order; `setup` runs once in every process before its first item.

    With one worker everything runs in this process. At most `3 * workers` items are read ahead. Workers die with this
    process, even after SIGKILL. Exceptions of `work` are raised here.

    Raises:
        StageError: a worker died (killed, or out of memory).
    """
    if workers <= 1:
        setup(*setup_arguments)
        yield from map(work, items)
        return
    # Spawned, not forked: progress bars and tokenizers run threads, and a fork copies locks held by them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(os.getpid(), setup, setup_arguments)
    ) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 3 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise StageError("a worker process died (killed, or out of memory); try fewer --workers") from None
        finally:
            if waiting:  # the consumer stopped early, or a worker failed
                for future in waiting:
                    future.cancel()
                for process in multiprocessing.active_children():
                    process.terminate()


def _start(parent: int, setup: Callable[..., None], arguments: tuple[object, ...]) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts
    setup(*arguments)
