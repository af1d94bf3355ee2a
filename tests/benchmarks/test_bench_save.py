"""The benchmark of saves gives its figures and marks a wait above the goal; `make bench-save` gives those of a real size."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks import bench_save
from tests.benchmarks.bench_train import record_path

BENCHMARK = Path(__file__).with_name("bench_save.py")
PYTHON = Path(__file__).parents[2] / "tools/pretrain/.venv/bin/python"
FOUND = {"blocking": 2.0, "waits": 0.1, "share": 0.05, "longer": 0.5, "published": 4.0, "memory": 2e8, "plan": 3e8}


def test_figures_of_both_saves_are_recorded(tmp_path: Path) -> None:
    words = [PYTHON, BENCHMARK, "--size=tiny", "--processes=1", "--rounds=1", "--results", tmp_path, "--record"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode in (0, 1), answer.stderr  # of a tiny model nobody waits for the disk
    content = json.loads((tmp_path / "save-cpu.json").read_text())
    found = content["results"]["tiny, 1"]
    assert found.keys() == FOUND.keys() | {"rounds"}
    assert 0 < found["waits"] < found["published"]
    assert found["share"] == pytest.approx(found["waits"] / found["blocking"], rel=1e-2)
    assert content["machine"]["device"] == "CPU"
    assert re.search(r"^\| tiny, 1 \| [\d.]+ s \| [\d.]+ s \| [\d.]+% \|", answer.stdout, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["save-cpu.json"]


def test_records_are_within_goal_and_plan() -> None:
    for path in bench_save.RESULTS.glob("save-*.json"):
        content = json.loads(path.read_text())
        assert record_path(content["machine"], of="save") == path
        for each in content["results"].values():
            assert each["share"] <= bench_save.GOAL
            assert each["memory"] <= each["plan"]


@pytest.mark.parametrize(
    ("figures", "mark"),
    [
        ({"share": 0.1, "memory": 3e8}, None),
        ({"share": 0.11}, "ABOVE THE GOAL 50m"),
        ({"memory": 3.1e8}, "ABOVE THE PLAN 50m"),
    ],
)
def test_more_than_goal_or_plan_is_the_exit_code(
    figures: dict[str, float],
    mark: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench_save, "measure", lambda name, processes, rounds: FOUND | figures)
    monkeypatch.setattr(bench_save, "machine", lambda: {"device": "CPU"})
    assert bench_save.main(["--results", str(tmp_path)]) == (mark is not None)
    told = capsys.readouterr().out
    assert told.count("ABOVE") == told.count(mark or "ABOVE") == (2 if mark else 0)
    assert "| 50m, 2 | 2.00 s | 0.100 s | " in told
    assert list(tmp_path.iterdir()) == []
