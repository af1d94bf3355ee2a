"""Calls of the user's Python with a time limit, which a signal to stop cuts short."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from shared.errors import EXIT_FAILED, EXIT_INTERRUPTED

STOP_SECONDS = 10.0  # after a signal to stop: what a call may take to return by itself
UNWIND_SECONDS = 5.0  # for the call to leave once it is interrupted; compiled code may not
_POLL_SECONDS = 0.1
_WAKE = signal.SIGRTMIN  # SIGUSR2 asks for stacks (shared/runtime/progress.py)
_STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class TimeLimit(Exception):  # noqa: N818 -- the caller words the error
    """A call took longer than its limit."""


class StopAsked(Exception):  # noqa: N818
    """A signal asked to stop and the call did not return."""


class _Wake(BaseException):
    """Raised inside the call; `except Exception` of the user's does not catch it."""


def call_within[T](function: Callable[[], T], seconds: float, *, where: str) -> T:
    """Call `function` in this, the main thread: libraries that set alarms for themselves work only there.

    A watcher thread interrupts it, also in a system call. If it does not unwind (compiled code, an `except` that swallows
    everything), the process ends with one line: exit 1 after the limit, 75 after a signal, as the exceptions would.

    Args:
        function: the call.
        seconds: its limit.
        where: names the call in that line.

    Raises:
        TimeLimit: after `seconds`.
        StopAsked: SIGTERM or SIGUSR1 came, and STOP_SECONDS later the call had not returned.
    """
    started = time.monotonic()
    asked: list[float] = []
    reasons: list[Exception] = []
    returned = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(time.monotonic())
        try:
            previous[number](number, frame)
        except SystemExit:  # the command's handler until training starts: it ends at once, and is not the call's exit
            reasons.append(StopAsked(f"stopped by a signal while {where} ran"))
            raise _Wake from None

    def wake(number: int, frame: FrameType | None) -> None:
        if not returned.is_set():
            raise _Wake

    def watch() -> None:
        while not returned.wait(_POLL_SECONDS):
            now = time.monotonic()
            if now - started > seconds:
                reasons.append(TimeLimit(f"{where} took longer than {seconds:g} s"))
            elif asked and now - asked[0] > STOP_SECONDS:
                reasons.append(StopAsked(f"stopped by a signal while {where} ran"))
            else:
                continue
            signal.pthread_kill(threading.main_thread().ident, _WAKE)  # type: ignore[arg-type]
            if not returned.wait(UNWIND_SECONDS):
                sys.stderr.write(f"{reasons[0]}, and it cannot be interrupted; nothing is published\n")
                sys.stderr.flush()
                os._exit(EXIT_FAILED if isinstance(reasons[0], TimeLimit) else EXIT_INTERRUPTED)
            return

    # A handler that is no function is the default: the signal ends the process anyway.
    handlers = {number: signal.getsignal(number) for number in _STOPPING}
    previous: dict[int, Any] = {number: handler for number, handler in handlers.items() if callable(handler)}
    signal.signal(_WAKE, wake)  # stays: a late one finds the call returned
    for number in previous:
        signal.signal(number, note)
    watcher = threading.Thread(target=watch, name="reward-time-limit", daemon=True)
    watcher.start()
    try:
        return function()
    except BaseException:
        returned.set()
        if reasons:  # also where the call turned the interruption into an error of its own
            raise reasons[0] from None
        raise
    finally:
        returned.set()
        watcher.join()
        for number, handler in previous.items():
            signal.signal(number, handler)
