"""The benchmark of rlhf runs every way that is here, and phases add up; `make bench-rlhf` measures a larger model."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).with_name("bench_rlhf.py")
PYTHON = Path(__file__).parents[2] / "tools/rlhf/.venv/bin/python"
SIZE = ("--hidden=32", "--layers=1", "--batch=16", "--tokens=8", "--steps=4")


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
    assert content["overheads"] == {"rlhf grpo": pytest.approx(ours / alone - 1)}
    assert "| rlhf ppo | " in answer.stdout
    assert "of TRL's GRPOTrainer alone" in answer.stdout
