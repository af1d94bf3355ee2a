"""`pretrain train --rehearse` through its command line, in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.rehearsal import build_stubs
from tests.tools.pretrain.runs import REPOSITORY, run, words

ROWS = {"sequence_length": 128, "global_batch_size": 128, "micro_batch_size": 64, "precision": "bf16", "steps": 1}


def rehearsed(source: Path, data: Path, target: Path, **options) -> subprocess.CompletedProcess:
    line = words(source, data, target, **{**ROWS, "save_every": None, "validate_every": None, **options})
    return subprocess.run(
        [sys.executable, "-m", "tools.pretrain.cli", *line, "--rehearse"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def content(*folders: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) for folder in folders for path in folder.rglob("*")
    }


def test_a_run_that_fits_is_said_to_and_nothing_is_written(source, data, tmp_path) -> None:
    before = content(source, data)
    saves = {"save_every": 1, "validate_every": 1, "keep_best": "true", "early_stop": 1, "steps": 4}
    given = {"world": 8, "pipeline_parallel": 2, "gpu": "a100-80", "micro_batch_size": 16, **saves}
    done = rehearsed(source, data, tmp_path / "run", **given)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(
        "rehearsal   2 of 8 ranks, the first of each pipeline stage, on A100 80 GB (80.0 GiB, 4.0 GiB"
    )
    assert lines[1].split() == ["rank", "stage", "states", "activations", "peak", "reserved", "margin"]
    assert [line.split()[:2] for line in lines[2:4]] == [["0", "0"], ["4", "1"]]
    assert "match on the ranks played" in done.stdout
    assert "checkpoint  9 tensors match by name and shape" in done.stdout
    assert "not yet compared with a GPU" in lines[-1]
    assert "layout      8 processes: pipeline 2 x data 4" in done.stderr
    assert not (tmp_path / "run").exists()
    assert content(source, data) == before


def test_a_run_that_does_not_fit_is_refused_with_what_mends_it(source, data, tmp_path) -> None:
    """The message's flag makes it fit: it was rehearsed, with the memory that it says."""
    done = rehearsed(source, data, tmp_path / "run", world=2, gpu_memory="4.14GiB", all_ranks=True)
    assert done.returncode == 2, done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith(
        "pretrain train: error: --rehearse: rank 0 (pipeline stage 0) does not fit on H100 80 GB: it needs "
    )
    assert "; out of memory in forward and backward of update 2, in " in message
    assert "; give --micro-batch-size 32, which was rehearsed and needs " in message
    assert "rehearsal   2 of 2 ranks, every rank" in done.stdout
    assert "-" in done.stdout.splitlines()[2].split()[-2]  # the margin
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h200"}, "--gpu belongs to --rehearse"),
        ({"gpu_memory": "80GiB"}, "--gpu-memory belongs to --rehearse"),
        ({"world": 8}, "--world belongs to --rehearse"),
        ({"all_ranks": True}, "--all-ranks belongs to --rehearse"),
        ({"rehearse": True, "gpu_memory": "80"}, "--gpu-memory 80: give the memory of a GPU with its unit"),
        ({"rehearse": True, "world": 8, "processes": 4}, "both say how many ranks there are"),
        ({"rehearse": True, "world": 6, "tensor_parallel": 4}, "--world 6 is not a multiple of --tensor-parallel 4"),
        ({"rehearse": True, "processes": 6, "tensor_parallel": 4}, "--processes 6 is not a multiple of"),
        ({"rehearse": True, "backend": "te"}, "--rehearse has no stubs for TransformerEngine"),
        ({"rehearse": True, "gpu": "h100"}, "'a100-40', 'a100-80', 'l40s', 'h100-80', 'h200' or 'b200'"),
    ],
)
def test_flags_that_do_nothing_or_contradict_are_refused(source, data, tmp_path, capsys, options, message) -> None:
    assert run(source, data, tmp_path / "run", **options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_where_a_rehearsal_cannot_start_it_says_so(source, data, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(build_stubs, "stubs_folder", lambda: tmp_path / "stubs")
    monkeypatch.setenv("PATH", "/nowhere")
    assert run(source, data, tmp_path / "run", rehearse=True) == 2
    assert "cannot be built here: g++ and nm not found; install g++" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(source, data, tmp_path / "run", rehearse=True) == 2
    assert "start it without torchrun" in capsys.readouterr().err
