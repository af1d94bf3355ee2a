"""`pretrain plan` through its command line; its winner is rehearsed, and trained by, `pretrain train`."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from shared.training import plan_file, stage
from shared.training.options import TrainingOptions
from tests import training_runs
from tests.tools.pretrain.runs import MODEL, REPOSITORY
from tools.pretrain.cli import tool

SIZES = {"gpus": 4, "gpus_per_node": 2, "global_batch_size": 16, "sequence_length": 32}


def command(*line: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tools.pretrain.cli", *map(str, line)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_the_best_layout_is_one_that_train_takes(source, data, tmp_path, capsys) -> None:
    """From a config.json alone. The printed command is rehearsed, and `--plan` has the same layout."""
    plan = tmp_path / "plan.json"
    given = {**SIZES, "source": source / "hf" / "config.json", "top": 1, "json": plan}
    done = command(*training_runs.words("plan", **given))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(
        "plan        4 x H100 80 GB (79.6 GiB, 4.0 GiB of it kept free), 16 sequences of 32 an update"
    )
    assert re.match(r"searched    \d+ legal layouts; 0 cannot hold their states; \d+ rehearsed", lines[1])
    assert "launch map  4 ranks on 2 nodes" in lines
    assert any(line.startswith("assumed     links 75% (assumed) of 450 GB/s within a node of 2 GPUs") for line in lines)
    assert "neither was compared with a GPU" in done.stdout
    written = json.loads(plan.read_text())
    assert written["layouts"][0]["bytes"]["reserved"] < 79 << 30
    assert sum(written["layouts"][0]["seconds"].values()) == pytest.approx(
        2 * written["layouts"][0]["seconds"]["update"]
    )

    words = shlex.split(lines[-1])
    assert words[:2] == ["pretrain", "train"]
    words = [{"SOURCE": source, "DATA": data, "RUN": tmp_path / "run"}.get(word, word) for word in words[1:]]
    played = command(*words)
    assert played.returncode == 0, played.stderr
    assert "launch map  4 ranks on 2 nodes" in played.stdout
    flags = written["layouts"][0]["flags"]
    assert f"in {16 // (int(flags['--micro-batch-size']) * _data(flags))} micro batch" in played.stderr

    options = TrainingOptions(source=source, data=(), target=tmp_path / "run", global_batch_size=16)
    taken = plan_file.taken(options, plan, architecture=MODEL, sequence_length=32)
    parallel = stage.parallel_config(replace(taken, processes=4))
    layout = next(line for line in played.stderr.splitlines() if line.startswith("layout "))
    assert layout.removeprefix("layout      4 processes: ") == str(parallel)
    words = {"source": source, "data": data, "target": tmp_path / "run", "plan": plan, "processes": 8}
    line = training_runs.words("train", **words, sequence_length=32, global_batch_size=16)
    assert training_runs.exit_code(tool, line) == 2
    assert "was made for 4 GPUs, and --processes is 8" in capsys.readouterr().err


def _data(flags: dict[str, str]) -> int:
    model = [int(flags.get(f"--{name}-parallel", 1)) for name in ("tensor", "pipeline", "context")]
    return 4 // (model[0] * model[1] * model[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "/nowhere"}, "/nowhere"),
        ({"source": "."}, "--source . has no config.json that says what the model is"),
        ({"gpu": "h100"}, "'a100-40', 'a100-80', 'l40s', 'h100-80', 'h200' or 'b200'"),
        ({"gpu_memory": "3GiB"}, "--gpu-memory 3GiB: give the memory of a GPU with its unit"),
        ({"gpus": 0}, "--gpus"),
        ({"sequence_length": 4096}, "longer than the model's max_position_embeddings 128"),
        ({"json": "/nowhere/plan.json"}, "the folder /nowhere is not there"),
    ],
)
def test_what_cannot_be_planned_is_refused(source, capsys, monkeypatch, changes, message) -> None:
    monkeypatch.chdir(source / "release")
    line = training_runs.words("plan", **{**SIZES, "source": source, **changes})
    assert training_runs.exit_code(tool, line) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_plan_is_made_outside_of_a_launch(source, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert training_runs.exit_code(tool, training_runs.words("plan", **{**SIZES, "source": source})) == 2
    assert "pretrain plan plays every rank by itself; start it without torchrun" in capsys.readouterr().err
