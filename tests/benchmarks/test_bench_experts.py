"""The benchmark of experts measures both ways in both precisions; `make bench-experts` gives the figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

BENCHMARK = Path(__file__).with_name("bench_experts.py")
PYTHON = Path(__file__).parents[2] / "tools/pretrain/.venv/bin/python"


def test_both_ways_are_measured_and_recorded(tmp_path: Path) -> None:
    words = [PYTHON, BENCHMARK, "--experts=8", "--rounds=1", "--results", tmp_path, "--record"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    content = json.loads((tmp_path / "experts-cpu.json").read_text())
    assert content["machine"]["device"] == "CPU"
    assert list(content["results"]) == ["8, float32", "8, bfloat16"]
    assert all(each.keys() == {"loop", "grouped"} and min(each.values()) > 0 for each in content["results"].values())
    assert len(re.findall(r"^\| 8, b?float\d\d \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", answer.stdout, re.MULTILINE)) == 2
