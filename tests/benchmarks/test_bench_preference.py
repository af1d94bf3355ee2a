"""The benchmark of sampled rewards trains and samples both sides of a cell, keeps it, and fails by its verdict."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks import bench_preference

BENCHMARK = Path(__file__).with_name("bench_preference.py")
PYTHON = Path(__file__).parents[2] / "tools/rlhf/.venv/bin/python"


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    words = [
        PYTHON,
        BENCHMARK,
        "--work",
        folder,
        "--ways=dpo",
        "--seeds=1",
        "--replies=4",
        "--results",
        folder,
        "--record",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def test_a_directory_beats_its_control_or_the_benchmark_fails(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "preference-cpu.json").read_text())
    (cell,) = content["cells"]["dpo"].values()
    assert [cell[side]["replies"] for side in ("trained", "control")] == [4 * 48, 4 * 48]
    assert (cell["trained"]["moved"], cell["control"]["moved"]) == (True, False)
    assert cell["trained"]["reward"] > 2 * cell["control"]["reward"] > 0.1
    assert cell["trained"]["said"] >= 0.9  # accuracy
    assert content["failures"] == []
    assert "every directory beats its control" in done.stdout
    # What is kept is not measured again; a cell that proves nothing fails.
    (path,) = (tmp_path / "preference" / "cells").iterdir()
    kept = json.loads(path.read_text())
    kept["cell"]["trained"]["reward"] = kept["cell"]["control"]["reward"] + 0.01
    path.write_text(json.dumps(kept))
    again = run(tmp_path)
    assert again.returncode == 1
    assert "measuring" not in again.stderr
    assert "dpo, seed 0: +0.010 above its control, 3 errors are" in again.stderr.strip().splitlines()[-1]
    assert "FAILED" in again.stdout


def cell(trained: float, control: float, error: float, moved: bool = False) -> bench_preference.Cell:
    return {
        "trained": {"reward": trained, "error": error, "said": None, "moved": True},
        "control": {"reward": control, "error": error, "said": None, "moved": moved},
    }


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (cell(0.2, 0.1, 0.01), None),  # 7 errors of the difference
        (cell(0.2, 0.1, 0.03), "+0.100 above its control, 3 errors are 0.127"),
        (cell(0.1, 0.4, 0.01), "-0.300 above its control"),
        (cell(0.9, 0.1, 0.01, moved=True), "at learning rate 0 the weights are not the source's"),
    ],
)
def test_the_verdict_is_of_every_seed(made: bench_preference.Cell, words: str | None) -> None:
    found = {"dpo": {"0": cell(0.9, 0.1, 0.01), "1": made}}
    lines = bench_preference.failures(found)
    assert len(lines) == (words is not None)
    assert all(line.startswith("dpo, seed 1: ") and str(words) in line for line in lines)
    assert "| `dpo` | 0.900 " in bench_preference.table(found)


def test_cells_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    assert bench_preference.kept(path, {"replies": 4}) is None
    path.write_text(json.dumps({"of": {"replies": 4}, "cell": {"trained": {}}}))
    assert bench_preference.kept(path, {"replies": 4}) == {"trained": {}}
    assert bench_preference.kept(path, {"replies": 5}) is None
