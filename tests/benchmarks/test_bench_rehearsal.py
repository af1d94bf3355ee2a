"""One run of `make bench-rehearsal`: what the rehearsal says is what torch measures. The record has all of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.benchmarks.bench_rehearsal import RESULTS, TOLERANCE, difference

BENCHMARK = Path(__file__).with_name("bench_rehearsal.py")
PYTHON = Path(__file__).parents[2] / "tools/pretrain/.venv/bin/python"


def test_the_rehearsed_peak_is_the_measured_one() -> None:
    done = subprocess.run([PYTHON, BENCHMARK, "dense"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert cells[0] == "dense"
    assert abs(float(cells[3].rstrip("%"))) < 0.3
    assert abs(float(cells[6].rstrip("%"))) < 0.6  # of the passes alone


def test_every_recorded_peak_is_within_the_tolerance() -> None:
    found = json.loads((RESULTS / "rehearsal-cpu.json").read_text())["results"]
    assert len(found) >= 12
    assert all(abs(difference(of)) < TOLERANCE for of in found.values())
