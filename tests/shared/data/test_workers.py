"""The worker pool: results in order, errors raised in the parent, no process left when the parent is killed."""

import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.data import workers
from shared.data.workers import Workers, ordered_map
from shared.errors import StageError, UserError


def _nothing() -> None:
    pass


def _square(value: int) -> int:
    if value == 13:
        raise UserError("file:13: unlucky")
    if value == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return value * value


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    assert list(ordered_map(_square, range(12), workers=workers, setup=_nothing)) == [i * i for i in range(12)]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_workers_error_is_raised_here(workers: int) -> None:
    with pytest.raises(UserError, match="^file:13: unlucky$"):
        list(ordered_map(_square, [1, 13, 2], workers=workers, setup=_nothing))


def test_a_dead_worker_ends_the_work() -> None:
    with pytest.raises(StageError, match="worker process died"):
        list(ordered_map(_square, [1, 17, 2], workers=2, setup=_nothing))


_seen: list[str] = []


def _remember(word: str) -> None:
    _seen.append(word)


def _told(_: int) -> tuple[int, list[str]]:
    return os.getpid(), list(_seen)


def test_every_process_is_told_what_is_known_late() -> None:
    with Workers(2, _remember, "early") as processes:
        processes.set_up(_remember, "first")
        ((_, first),) = processes.map(_told, range(1))  # the other process has no item
        processes.set_up(_remember, "second")
        found = list(processes.map(_told, range(8)))
    assert first == ["early", "first"]
    for process, seen in found:
        assert seen in (["early", "first", "second"], ["early", "second"])
        assert process != os.getpid()
    with Workers(1, _remember, "early") as here:
        here.set_up(_remember, "first")
        assert next(here.map(_told, [0])) == (os.getpid(), ["first"])
    _seen.clear()
    ((process, _),) = ordered_map(_told, [0], workers=1, setup=_nothing, apart=True)
    assert process != os.getpid()


def test_so_many_items_are_read_ahead() -> None:
    with Workers(2) as processes:
        items = iter(range(20))
        first, second = processes.map(_square, items, ahead=2), processes.map(_square, items)
        assert next(items) == 8  # 2, and 3 for each process
        second.close()
        assert next(first) == 0
    items = iter(range(20))
    with Workers(1) as here:
        here.map(_square, items, ahead=2)
    assert next(items) == 0, "in this process nothing is"


def _touch(path: Path) -> None:
    time.sleep(0.2)
    path.touch()


def test_items_that_nobody_waits_for_are_not_done(tmp_path: Path) -> None:
    with Workers(2) as processes:
        left = processes.map(_touch, [tmp_path / str(number) for number in range(30)], ahead=30)
        left.close()
        assert list(processes.map(_square, [3])) == [9]
        assert len(list(tmp_path.iterdir())) < 15, "all but those on their way to a process are cancelled"


def test_a_process_that_another_left_no_set_up_for_an_old_item_has_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other one had no item of the first set-up before its item of the second, and so took two."""
    given: queue.Queue[tuple[int, object, tuple[str]]] = queue.Queue()
    called: list[str] = []
    given.put((2, called.append, ("second",)))
    monkeypatch.setattr(workers, "_process", {"given": given, "number": 0})
    assert workers._run(1, _square, 5) is None
    assert called == ["second"]
    assert workers._run(2, _square, 5) == 25
    assert called == ["second"]


def test_a_worker_does_not_import_the_main_module_again(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[3])
    (tmp_path / "job.py").write_text("def nothing(): pass\ndef sleep(folder): return folder\n")
    (tmp_path / "main.py").write_text(
        f"open({str(tmp_path / 'imports')!r}, 'a').write('x')\n" + SCRIPT.format(root=root, folder=str(tmp_path))
    )
    subprocess.run([sys.executable, str(tmp_path / "main.py")], check=True)
    assert (tmp_path / "imports").read_text() == "x"


SCRIPT = """
import sys, time, pathlib, os
sys.path[:0] = [{root!r}, {folder!r}]
from shared.data.workers import ordered_map
from job import sleep, nothing
if __name__ == "__main__":
    list(ordered_map(sleep, [{folder!r}] * 2, workers=2, setup=nothing))
"""
JOB = """
import os, pathlib, time
def nothing(): pass
def sleep(folder):
    pathlib.Path(folder, f"pid-{os.getpid()}").touch()
    time.sleep(60)
"""


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[3])
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "main.py").write_text(SCRIPT.format(root=root, folder=str(tmp_path)))
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py")])
    deadline = time.monotonic() + 30
    while len(pids := [int(f.name[4:]) for f in tmp_path.glob("pid-*")]) < 2:
        assert time.monotonic() < deadline, "workers did not start"
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
