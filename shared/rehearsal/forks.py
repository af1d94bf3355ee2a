"""Work in forked processes: what was imported is imported once."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Mapping
from typing import Any


class Failed(Exception):  # noqa: N818 -- of a child, raised here
    """A child's exception that is not returned: its type and message, and its traceback."""

    def __init__(self, line: str, trace: str) -> None:
        super().__init__(line, trace)  # both, for pickle
        self.line, self.trace = line, trace

    def __str__(self) -> str:
        return self.line


def in_forks[K, T](
    work: Mapping[K, Callable[[], T]], *, at_once: int, returned: type[Exception]
) -> dict[K, T | Exception]:
    """Results of all `work`, each in a process forked from this one.

    Args:
        work: functions, whose results are picklable.
        at_once: processes at a time.
        returned: exceptions of this type are results; others become `Failed`.
    """
    waiting, found = list(work.items()), dict[K, T | Exception]()
    running: dict[K, tuple[int, int]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            name, function = waiting.pop(0)
            running[name] = _start(function, returned)
        name, (process, pipe) = next(iter(running.items()))
        del running[name]
        with os.fdopen(pipe, "rb") as answer:
            text = answer.read()
        _, status = os.waitpid(process, 0)
        found[name] = pickle.loads(text) if text else Failed(_end(status), "")  # noqa: S301 -- written by our own fork
    return found


def _start(function: Callable[[], Any], returned: type[Exception]) -> tuple[int, int]:
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    os.close(reading)
    try:
        answer = function()
    except returned as error:
        answer = error
    except BaseException as error:  # noqa: BLE001 -- told to the parent
        answer = Failed(f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc())
    with os.fdopen(writing, "wb") as out:
        out.write(pickle.dumps(answer))
    os._exit(0)  # no clean-up of what the parent has open


def _end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"its process was killed by signal {-code}" if code < 0 else f"its process ended with {code}"
