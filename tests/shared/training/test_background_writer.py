"""The forked writer of a save: its results, its failures and its end. The requests are made up; real ones: test_every_save.py."""

import errno
import gc
import os
import queue
import signal
import time
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from shared.checkpoint.directory.manifest import FileEntry
from shared.checkpoint.files import hash_bytes
from shared.training import background_writer
from shared.training.background_writer import BackgroundWriter


@pytest.fixture
def begin(tmp_path):
    """A function from what is done before the file is written to a writer and its queue of results."""

    def make(before=lambda: None):
        results = queue.Queue()

        def write(rank, buckets, queue):
            before()
            for path, *_ in buckets:
                Path(path).write_bytes(b"content")
            queue.put({rank: ["written"]})

        request = AsyncRequest(write, (3, [(str(tmp_path / "__3_0.distcp"), "__3_0.distcp", ([], []))], results), [])
        return BackgroundWriter(request, tmp_path), results

    return make


def wait(writer) -> None:
    deadline = time.monotonic() + 30
    while not writer.ended():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def until(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def test_results_and_hashes_come_back_at_the_end(begin, tmp_path):
    writer, results = begin(lambda: until(tmp_path / "go"))
    assert not writer.ended()
    assert results.empty()
    (tmp_path / "go").touch()
    wait(writer)
    assert results.get_nowait() == {3: ["written"]}
    assert writer.entries == {"__3_0.distcp": FileEntry(size=7, hash=hash_bytes(b"content"))}
    assert writer.ended()


def test_a_rank_with_nothing_to_write_has_ended(tmp_path):
    writer = BackgroundWriter(AsyncRequest(None, (), []), tmp_path)
    assert writer.ended()
    assert writer.entries == {}


def test_an_error_is_the_result(begin):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    writer, results = begin(fail)
    wait(writer)
    assert "No space left on device" in str(results.get_nowait())
    assert writer.entries == {}


def test_a_killed_writer_is_named(begin):
    writer, results = begin(lambda: os.kill(os.getpid(), signal.SIGKILL))
    wait(writer)
    assert "was killed by SIGKILL; if nobody sent a signal, memory ran out" in str(results.get_nowait())


def test_signals_are_the_trainers(begin):
    """The launcher's and Slurm's reach every process."""

    def send():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(os.getpid(), number)

    writer, results = begin(send)
    wait(writer)
    assert results.get_nowait() == {3: ["written"]}


@pytest.fixture
def in_child():
    """A list of functions that forks of this test run before anything else. Hooks last as long as the process."""
    functions = []
    os.register_at_fork(after_in_child=lambda: [function() for function in functions])
    yield functions
    functions.clear()


def test_the_trainers_garbage_is_not_destroyed_in_the_writer(begin, in_child):
    """Its end may wait for a thread that the writer lacks."""
    trainer = os.getpid()

    class Group:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            while os.getpid() != trainer:
                time.sleep(1)

    in_child.append(lambda: [[] for _ in range(100_000)])  # enough for a collection
    Group()
    writer, results = begin()
    wait(writer)
    assert results.get_nowait() == {3: ["written"]}
    assert gc.isenabled()


def test_a_process_that_stands_still_is_none(begin, in_child, monkeypatch, capsys):
    monkeypatch.setattr(background_writer, "_BEGIN", 0.5)
    in_child.append(lambda: time.sleep(60))
    before = time.monotonic()
    writer, results = begin()
    assert time.monotonic() - before < 30
    assert writer.ended()
    assert results.get_nowait() == {3: ["written"]}
    assert "rank 3: no process for the save (it stood still for 0.5 s)" in capsys.readouterr().err


def test_without_a_process_the_save_is_blocking_and_says_so(begin, monkeypatch, capsys):
    def refuse():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", refuse)
    writer, results = begin()
    assert writer.ended()
    assert results.get_nowait() == {3: ["written"]}
    assert "rank 3: no process for the save (Cannot allocate memory)" in capsys.readouterr().err


def test_a_writer_is_killed_on_demand_and_with_its_trainer(begin, tmp_path):
    def note():
        (tmp_path / "pid.new").write_text(str(os.getpid()))
        (tmp_path / "pid.new").rename(tmp_path / "pid")
        time.sleep(60)

    writer, _ = begin(note)
    until(tmp_path / "pid")
    writer.kill()
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()

    (tmp_path / "pid").unlink()
    trainer = os.fork()
    if not trainer:
        begin(note)
        time.sleep(60)
    until(tmp_path / "pid")
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    status, deadline = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status"), time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "the writer outlived its trainer"
        time.sleep(0.01)
