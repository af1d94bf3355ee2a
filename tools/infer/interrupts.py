"""Ctrl-C while `infer chat` loads a model and while it replies."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType

_EVERY = 0.2  # seconds between two looks at whether the model is loaded


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Context manager: processes that are started inside never get SIGINT; in this one it still raises KeyboardInterrupt.

    A terminal sends Ctrl-C to all processes of a command, and an engine's processes end at it. They inherit a mask that blocks
    it, through forks and new programs alike, whatever handlers they install. Meanwhile a thread waits for the signal here and
    wakes the main thread by SIGTERM, whose handler must raise SystemExit, as that of `shared.cli` does.
    """
    # Its start would unblock SIGINT in this thread (multiprocessing.resource_tracker, Python 3.12).
    resource_tracker.ensure_running()
    main, came, over = threading.get_ident(), threading.Event(), threading.Event()
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def wait() -> None:
        while not over.is_set():
            if signal.sigtimedwait({signal.SIGINT}, _EVERY):
                came.set()
                signal.pthread_kill(main, signal.SIGTERM)
                return

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    try:
        yield
    except SystemExit:
        if came.is_set():
            raise KeyboardInterrupt from None
        raise
    finally:
        over.set()
        waiting.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


@contextlib.contextmanager
def remembered() -> Iterator[Callable[[], bool]]:
    """Context manager: SIGINT is remembered, since an engine must not be left within a step. The value says if it came."""
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    earlier = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, earlier)
