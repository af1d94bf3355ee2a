"""Ways in which a run could be lost: damaged saves, full disks, removed targets, hostile or broken inputs."""

import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shared.training.recorder import Recorder
from tests.tools.pretrain.runs import MODEL, launched, run, words
from tests.training_runs import random_model, record, tensors


def test_a_damaged_save_is_named_and_the_one_before_it_is_used(whole, stopped, source, data, tmp_path, capsys):
    """A flipped bit in the newest of two saves: the run resumes from the older one, and ends with the same numbers."""
    target = tmp_path / "run"
    shutil.copytree(stopped, target)
    shard = max((target / "iter_0000006").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run(source, data, target) == 0
    told = capsys.readouterr().err
    assert f"{shard} is damaged: its content has changed since it was saved; resuming from iter_0000004" in told
    assert "resuming after update 4 of 12" in told
    assert record(target) == record(whole)
    ours, theirs = tensors(target), tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_truncated_save_without_another_is_an_error(stopped, source, data, tmp_path, capsys):
    target = tmp_path / "run"
    shutil.copytree(stopped, target)
    shutil.rmtree(target / "iter_0000004")
    shard = min((target / "iter_0000006").glob("*.distcp"))
    size = shard.stat().st_size
    os.truncate(shard, size - 5)
    assert run(source, data, target) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith(
        f"{shard} has {size - 5} bytes instead of {size}, and no earlier iteration is kept; begin again with --overwrite"
    )


@torch.no_grad()
def spoil(chunk) -> None:
    chunk.decoder.layers[1].mlp.linear_fc2.weight[3, 5] = float("nan")


def test_nan_in_the_source_is_named(data, tmp_path, capsys):
    source = random_model(tmp_path / "source", MODEL, spoil)
    assert run(source, data, tmp_path / "run") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == (
        f"pretrain train: error: --source {source}: decoder.layers.1.mlp.linear_fc2.weight has NaN or infinity; "
        "`convert inspect --scan` lists all such tensors"
    )


def test_a_target_removed_during_the_run_is_named(source, data, tmp_path, capsys, monkeypatch):
    plain, target = Recorder.updated, tmp_path / "run"

    def updated(self, step, *numbers):
        plain(self, step, *numbers)
        if step == 4:
            shutil.rmtree(target)

    monkeypatch.setattr(Recorder, "updated", updated)
    assert run(source, data, target) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"pretrain train: error: --target {target} was removed or renamed during the run"


@pytest.mark.parametrize(
    ("free", "text", "asynchronous"),
    [
        (0, "the disk of {run} is full; free some space and run the same command again", None),
        (1 << 30, "are free on the disk", "true"),
    ],
)
def test_a_save_that_fails_is_named_and_the_last_one_stays(
    whole, source, data, tmp_path, capsys, monkeypatch, free, text, asynchronous
):
    """Files of 300 kB at most from update 5 on: the second save fails, as on a full disk. The next run is whole again."""
    plain, target, limits = Recorder.updated, tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def updated(self, step, *numbers):
        plain(self, step, *numbers)
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "updated", updated)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        try:
            assert run(source, data, target, async_save=asynchronous) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("pretrain train: error: update 8 was not saved: ")
    assert text.format(run=target) in told
    assert json.loads((target / "manifest.json").read_text())["iteration"] == 4
    assert run(source, data, target) == 0
    assert record(target) == record(whole)


def test_metadata_that_would_run_code_is_refused(source, data, tmp_path, capsys):
    hostile = tmp_path / "model"
    shutil.copytree(source, hostile)
    (hostile / "release" / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "executed")))
    assert run(hostile, data, tmp_path / "run") == 2
    assert "is not allowed in a weight checkpoint; it was not executed" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_inputs_are_hashed_once_in_a_job(source, data, tmp_path):
    """Two processes: by the launcher, and by no rank."""
    script = """
import os, sys
from shared.training import data_sources, plan
hashed = plan.verify_content
def verify_content(checkpoint, flag):
    print("hashing", flag, os.environ.get("RANK"), file=sys.stderr, flush=True)
    hashed(checkpoint, flag=flag)
plan.verify_content = data_sources.verify_content = verify_content
from tools.pretrain.cli import tool
tool.run(sys.argv[1:])
"""
    done = launched(script, tmp_path, *words(source, data, tmp_path / "run", processes=2, steps=2))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("hashing")] == [
        "hashing --source None",
        "hashing --data None",
    ]


def test_a_stopped_rank_ends_the_job_with_its_name_and_stack(source, data, tmp_path):
    """SIGSTOP of rank 1 after update 3. Rank 0 waits in a collective for it."""
    script = """
import os, signal, sys, time
from shared.runtime.silence_warnings import silence
silence()
from shared.training.recorder import Recorder
from tools.pretrain.cli import tool
updated = Recorder.updated
def stop(self, step, *numbers):
    updated(self, step, *numbers)
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP); time.sleep(600)  # another thread may take the signal, a moment later
Recorder.updated = stop
tool.run(sys.argv[1:])
"""
    done = launched(script, tmp_path, *words(source, data, tmp_path / "run", processes=2, hang_timeout=5))
    assert done.returncode == 1
    told = done.stderr
    assert re.search(
        r"rank 1 hangs: for \d+ s in 'update 3: recording', which may take 5 s; it is stopped, by SIGSTOP", told
    )
    assert ", line 11 in stop" in told
    assert "rank 0 hangs" not in told
