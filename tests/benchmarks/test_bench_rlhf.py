"""The benchmark of rlhf runs every way that is here, and phases add up; `make bench-rlhf` measures a larger model."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks import bench_rlhf

BENCHMARK = Path(__file__).with_name("bench_rlhf.py")
PYTHON = Path(__file__).parents[2] / "tools/rlhf/.venv/bin/python"
SIZE = ("--hidden=32", "--layers=1", "--batch=16", "--tokens=8", "--steps=4", "--rounds=1")


def test_an_overhead_is_that_of_a_round() -> None:
    """A machine that is slower in a round is slower for both."""
    steps = [(1.1, 1.0), (2.4, 2.0), (1.3, 1.0)]
    rounds = [{"rlhf grpo": {"step": ours}, "TRL's GRPOTrainer alone": {"step": alone}} for ours, alone in steps]
    (found,) = bench_rlhf.overheads(rounds).values()
    assert found == {"median": pytest.approx(0.2), "least": pytest.approx(0.1), "most": pytest.approx(0.3)}
    assert bench_rlhf.typical(rounds)["rlhf grpo"] == {"step": 1.3}


def test_phases_are_those_of_a_step(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "BATON_TRLX"}
    words = [PYTHON, BENCHMARK, *SIZE, "--results", tmp_path, "--record"]
    answer = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    content = json.loads((tmp_path / "rlhf-cpu.json").read_text())
    found = content["seconds"]
    assert [*found] == ["rlhf grpo", "TRL's GRPOTrainer alone", "rlhf ppo"]  # trlx's ways need trlx
    for figures in found.values():
        assert all(figures[name] > 0 for name in ("rollout", "forward", "update", "score"))
        phases = sum(figures[name] for name in ("publish", "rollout", "score", "forward", "update"))
        assert phases == pytest.approx(figures["step"], rel=0.5)  # medians of each over two steps on a busy machine
    ours, alone = found["rlhf grpo"]["step"], found["TRL's GRPOTrainer alone"]["step"]
    of_one_round = dict.fromkeys(("median", "least", "most"), pytest.approx(ours / alone - 1))
    assert content["overheads"] == {"rlhf grpo": of_one_round}
    assert "| rlhf ppo | " in answer.stdout
    assert "of TRL's GRPOTrainer alone" in answer.stdout
