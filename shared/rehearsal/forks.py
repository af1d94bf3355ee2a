"""Work in forked processes: what was imported is imported once."""

from __future__ import annotations

import os
import pickle
import select
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
    work: Mapping[K, Callable[[], T]],
    *,
    at_once: int,
    returned: type[Exception],
    done: Callable[[K, T | Exception], None] = lambda name, result: None,
) -> dict[K, T | Exception]:
    """Results of all `work`, each in a process forked from this one.

    Args:
        work: functions, whose results are picklable.
        at_once: processes at a time.
        returned: exceptions of this type are results; others become `Failed`.
        done: is told each result when it is there.
    """
    waiting, found = list(work.items()), dict[K, T | Exception]()
    running: dict[int, tuple[K, int]] = {}  # by the pipe of its answer
    while waiting or running:
        while waiting and len(running) < at_once:
            name, function = waiting.pop(0)
            process, pipe = _start(function, returned)
            running[pipe] = name, process
        for pipe in select.select(list(running), [], [])[0]:
            name, process = running.pop(pipe)
            with os.fdopen(pipe, "rb") as answer:
                text = answer.read()
            _, status = os.waitpid(process, 0)
            found[name] = pickle.loads(text) if text else Failed(_end(status), "")  # noqa: S301 -- written by our own fork
            done(name, found[name])
    return {name: found[name] for name in work}


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
