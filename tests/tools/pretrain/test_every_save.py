"""Asynchronous saves: when they are published, what a run waits for, and the numbers, which are those of synchronous ones."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from shared.checkpoint.directory.open import open_checkpoint
from shared.training.background_writer import BackgroundWriter
from shared.training.recorder import Recorder
from tests.tools.pretrain.runs import launched, run, words
from tests.training_runs import record, signalled, tensors


@pytest.fixture
def held(monkeypatch, tmp_path):
    """Writers write when a file exists: a function that makes it. What stops them otherwise: the end of the trainer."""
    write, go = BackgroundWriter._write, tmp_path / "go"

    def waiting(self, directory):
        while not go.exists():
            time.sleep(0.01)
        write(self, directory)

    monkeypatch.setattr(BackgroundWriter, "_write", waiting)
    return go.touch


@pytest.fixture
def after(monkeypatch):
    """A function that has another called right after updates: `after(call)`, `call(step)`."""

    def watch(call):
        plain = Recorder.updated

        def updated(self, step, *numbers):
            plain(self, step, *numbers)
            call(step)

        monkeypatch.setattr(Recorder, "updated", updated)

    return watch


def iterations(target: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in target.glob("iter_*") if ".partial-" not in path.name)


def same(ours: Path, theirs: Path) -> None:
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert record(ours) == record(theirs)


def test_numbers_and_files_are_those_of_a_synchronous_run(whole, source, data, tmp_path, capsys):
    target = tmp_path / "run"
    assert run(source, data, target, async_save="true", save_every=2, keep=3) == 0
    told = capsys.readouterr().err
    assert "saves       written while training goes on, from a second copy of the state on the host: at most" in told
    same(target, whole)
    assert iterations(target) == [8, 10, 12]
    for iteration in (None, 8, 10):  # sizes and hashes are compared
        open_checkpoint(target, kinds=("megatron",), flag="--source", iteration=iteration)
    assert not list(target.glob("*.partial-*"))


def test_a_save_is_published_when_its_writer_has_ended_and_keep_leaves_it_alone(
    whole, source, data, tmp_path, held, after
):
    """One iteration is kept. The save of update 4 is written during updates 5 to 7, and published after 7 or 8."""
    target, seen = tmp_path / "run", {}

    def look(step):
        partial = [path.name.partition(".")[0] for path in target.glob("*.partial-*")]
        seen[step] = (partial, (target / "manifest.json").exists())
        if step == 7:
            held()

    after(look)
    assert run(source, data, target, async_save="true", keep=1) == 0
    assert seen[4] == ([], False)
    assert seen[5] == seen[6] == seen[7] == (["iter_0000004"], False)
    assert iterations(target) == [12]
    same(target, whole)


def test_one_save_is_in_flight_at_most_and_waiting_is_told(source, data, tmp_path, held, after, capsys):
    target, seen = tmp_path / "run", []

    def look(step):
        seen.append(len(list(target.glob("*.partial-*"))))
        if step == 4:  # the next save is due after this update; its predecessor ends half a second later
            threading.Timer(0.5, held).start()

    after(look)
    assert run(source, data, target, async_save="true", save_every=2, steps=8) == 0
    assert max(seen) == 1
    told = capsys.readouterr().err
    assert "s for the save of update 2, which was still being written; a higher --save-every avoids it" in told
    assert json.loads((target / "manifest.json").read_text())["iteration"] == 8


def test_a_signal_publishes_both_saves_and_the_run_resumes_bit_for_bit(whole, source, data, tmp_path):
    target = tmp_path / "run"
    with signalled(signal.SIGUSR1, after=6):
        assert run(source, data, target, async_save="true") == 75
    assert iterations(target) == [4, 6]
    assert run(source, data, target, async_save="true") == 0
    same(target, whole)


def test_a_loss_that_is_not_finite_leaves_the_save_in_flight(source, data, tmp_path, monkeypatch, capsys):
    """The writer of update 4 takes its time, and update 5 fails."""
    import shared.training.loop as loop

    write, plain, target = BackgroundWriter._write, loop.forward_backward, tmp_path / "run"
    monkeypatch.setattr(BackgroundWriter, "_write", lambda *given: (time.sleep(0.5), write(*given)))
    calls = []

    def spoiled(*given):
        calls.append(plain(*given))
        return calls[-1] if len(calls) < 5 else type(calls[-1])(**{**vars(calls[-1]), "mean": float("nan")})

    monkeypatch.setattr(loop, "forward_backward", spoiled)
    assert run(source, data, target, async_save="true") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith("the loss of update 5 is nan; update 4 is saved; lower --learning-rate")
    assert json.loads((target / "manifest.json").read_text())["iteration"] == 4


@pytest.mark.parametrize(("error", "published"), [(OSError("the disk is gone"), True), (KeyboardInterrupt(), False)])
def test_an_error_of_the_only_process_completes_the_save_in_flight(
    error, published, source, data, tmp_path, monkeypatch, after
):
    write, target = BackgroundWriter._write, tmp_path / "run"
    monkeypatch.setattr(BackgroundWriter, "_write", lambda *given: (time.sleep(0.5), write(*given)))

    def fail(step):
        if step == 5:
            raise error

    after(fail)
    assert run(source, data, target, async_save="true") != 0
    assert (target / "manifest.json").exists() == published


def test_a_killed_writer_ends_the_run_with_its_name(source, data, tmp_path, monkeypatch, capsys):
    target = tmp_path / "run"
    monkeypatch.setattr(BackgroundWriter, "_write", lambda *given: os.kill(os.getpid(), signal.SIGKILL))
    assert run(source, data, target, async_save="true") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "update 4 was not saved: rank 0: " in told
    assert "the process that wrote it was killed by SIGKILL; if nobody sent a signal, memory ran out" in told
    assert not (target / "manifest.json").exists()


def test_the_slowest_rank_decides_when_a_save_is_published(source, data, tmp_path):
    """Two processes, one save before the last: rank 1's writer waits until update 3. Both have a share of the state."""
    script = """
import os, sys, time
from pathlib import Path
from shared.runtime.silence_warnings import silence
silence()
from shared.training.background_writer import BackgroundWriter
from shared.training.recorder import Recorder
from tools.pretrain.cli import tool
target, write, updated = Path(sys.argv[1]), BackgroundWriter._write, Recorder.updated
def late(self, directory):
    while os.environ["RANK"] == "1" and not target.with_name("go").exists():
        time.sleep(0.01)
    write(self, directory)
def look(self, step, *numbers):
    updated(self, step, *numbers)
    if step == 3 and os.environ["RANK"] == "0":
        deadline = time.monotonic() + 60
        while not (written := list(target.glob("iter_0000002.partial-*/*"))) and time.monotonic() < deadline:
            time.sleep(0.1)
        written = [path.name for path in written]
        print("seen", sorted(written), (target / "manifest.json").exists(), file=sys.stderr, flush=True)
        target.with_name("go").touch()
BackgroundWriter._write, Recorder.updated = late, look
tool.run(sys.argv[2:])
"""
    target = tmp_path / "run"
    line = words(source, data, target, processes=2, steps=4, async_save="true", save_every=2)
    done = launched(script, tmp_path, target, *line)
    assert done.returncode == 0, done.stderr
    assert "seen ['__0_0.distcp'] False" in done.stderr
    for iteration in (2, 4):
        files = open_checkpoint(target, kinds=("megatron",), flag="--source", iteration=iteration).manifest.files
        shares = [files[f"iter_{iteration:07d}/__{rank}_0.distcp"].size for rank in range(2)]
        assert min(shares) > max(shares) / 3  # nothing is gathered on one rank
