"""Results, exceptions and deaths of forked work."""

import os
import signal
import time
from functools import partial

from shared.errors import UserError
from shared.rehearsal.forks import Failed, in_forks


def refuse() -> None:
    raise UserError("give another")


def break_down() -> None:
    raise KeyError("missing")


def test_results_come_back_by_name() -> None:
    parent = os.getpid()
    found = in_forks(
        {
            "large": lambda: bytes(1 << 20),
            "process": os.getpid,
            "refused": refuse,
            "broken": break_down,
            "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "exit": lambda: os._exit(3),
        },
        at_once=2,
        returned=UserError,
    )
    assert found["large"] == bytes(1 << 20)
    assert found["process"] != parent
    assert isinstance(found["refused"], UserError)
    assert str(found["refused"]) == "give another"
    assert isinstance(found["broken"], Failed)
    assert found["broken"].line == "KeyError: 'missing'"
    assert "in break_down" in found["broken"].trace
    assert str(found["killed"]) == "its process was killed by signal 9"
    assert str(found["exit"]) == "its process ended with 3"


def test_so_many_at_once(tmp_path) -> None:
    """Two that wait for each other end; one at a time they would not."""

    def meet(own: str, other: str) -> bool:
        (tmp_path / own).touch()
        deadline = time.monotonic() + 60
        while not (tmp_path / other).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return (tmp_path / other).exists()

    pairs = {"a": "b", "b": "a", "c": "d", "d": "c"}
    work = {own: partial(meet, own, other) for own, other in pairs.items()}
    assert in_forks(work, at_once=2, returned=UserError) == dict.fromkeys(pairs, True)


def test_what_ends_first_is_told_first_and_lets_the_next_begin() -> None:
    """The last begins beside the first, which is slow; results are in the order of the work."""
    times = {"slow": 1.0, "quick": 0.0, "last": 0.0}
    told: list[str] = []
    found = in_forks(
        {name: partial(time.sleep, seconds) for name, seconds in times.items()},
        at_once=2,
        returned=UserError,
        done=lambda name, result: told.append(name),
    )
    assert told == ["quick", "last", "slow"]
    assert list(found) == ["slow", "quick", "last"]


def test_not_more_at_once(tmp_path) -> None:
    def alone() -> bool:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.05)
        there = len(list(tmp_path.iterdir()))
        (tmp_path / str(os.getpid())).unlink()
        return there == 1

    assert all(in_forks(dict.fromkeys(range(3), alone), at_once=1, returned=UserError).values())
