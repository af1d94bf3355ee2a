"""Worker processes, and an ordered map over them. Results do not depend on the number of processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from types import ModuleType, TracebackType
from typing import Any, Self, TypeVar

from shared.errors import StageError
from shared.runtime.parent_death import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


class Workers:
    """Processes that start before what they work with is known: starting and imports take seconds of a core.

    With a count of one everything runs in this process. Processes die with this one, even after SIGKILL. Exceptions of the work
    are raised here.

    Args:
        count: how many.
        warm_up: called in every process as soon as it runs, with `arguments`. In this process it is not called.
        apart: a process of its own also for a count of one.
    """

    def __init__(
        self, count: int, warm_up: Callable[..., None] | None = None, *arguments: Any, apart: bool = False
    ) -> None:
        self._count, self._set_ups = count, 0
        self._pool: ProcessPoolExecutor | None = None
        if count <= 1 and not apart:
            return
        # Spawned, not forked: progress bars and tokenizers run threads, and a fork copies locks held by them.
        context = multiprocessing.get_context("spawn")
        self._given = context.Queue()
        start = (os.getpid(), self._given, warm_up, arguments)
        self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=start)
        before = multiprocessing.active_children()
        with _without_main():
            for _ in range(count):  # each starts a process
                self._pool.submit(_nothing)
        self._processes = [process for process in multiprocessing.active_children() if process not in before]

    def set_up(self, setup: Callable[..., None], *arguments: Any) -> None:
        """Have every process call `setup(*arguments)` before the first item that is submitted after this.

        Items of before are not waited for any more, and need not be done.
        """
        if self._pool is None:
            setup(*arguments)
            return
        self._set_ups += 1
        for _ in range(self._count):
            self._given.put((self._set_ups, setup, arguments))

    def map(
        self, work: Callable[[Item], Result], items: Iterable[Item], *, ahead: int | None = None
    ) -> Generator[Result]:
        """`work(item)` of every item, in order.

        Args:
            work: of an item; it and the items are pickled.
            items: read as they are needed.
            ahead: how many are read ahead, and begun before this returns: `3 * count` by default. In this process none are.

        Raises:
            StageError: a worker died (killed, or out of memory).
        """
        if self._pool is None:
            return (work(item) for item in items)
        left, waiting = iter(items), deque[Future[Result]]()
        number, pool = self._set_ups, self._pool

        def begin(count: int) -> None:
            for item in islice(left, count):
                waiting.append(pool.submit(_run, number, work, item))

        def results() -> Generator[Any]:
            try:
                yield None  # a generator that has not begun does not reach its `finally`
                while waiting:
                    with _named_death():
                        found = waiting.popleft().result()
                        begin(1)
                    yield found
            finally:
                for future in waiting:  # the consumer stopped early, or a worker failed
                    future.cancel()

        with _named_death():
            begin(ahead or 3 * self._count)
        found = results()
        next(found)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:
            for process in self._processes:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
        self._given.cancel_join_thread()  # what was meant for a process that had nothing to do
        self._given.close()


def ordered_map(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    setup: Callable[..., None],
    setup_arguments: tuple[object, ...] = (),
    apart: bool = False,
) -> Generator[Result]:
    """Yield `work(item)` for every item, in order; `setup` runs once in every process before its first item.

    With one worker everything runs in this process, or, with `apart`, in another.

    Raises:
        StageError: a worker died (killed, or out of memory).
    """
    with Workers(workers, apart=apart) as processes:
        processes.set_up(setup, *setup_arguments)
        yield from processes.map(work, items)


_process: dict[str, Any] = {}  # of a worker: the queue of what it is given, and the number of its last set-up


def _start(parent: int, given: Any, warm_up: Callable[..., None] | None, arguments: tuple[object, ...]) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts
    _process.update(given=given, number=0)
    if warm_up is not None:
        warm_up(*arguments)


def _nothing() -> None:
    pass


def _run(number: int, work: Callable[[Any], Any], item: Any) -> Any:
    # One was put for each process. Those of an earlier set-up were for processes that had no item of it.
    while _process["number"] < number:
        _process["number"], setup, arguments = _process["given"].get()
        if _process["number"] >= number:
            setup(*arguments)
    if _process["number"] > number:  # another process took the earlier one, and nobody waits for this item any more
        return None
    return work(item)


@contextlib.contextmanager
def _named_death() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise StageError("a worker process died (killed, or out of memory); try fewer --workers") from None


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes started in this do not import the main module: what they call is in others, and a command line has much."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
