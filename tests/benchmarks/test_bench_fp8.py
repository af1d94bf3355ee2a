"""The benchmark trains each cell once, resumes, and says what is apart; `make bench-fp8` gives the figures."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.bench_fp8 import HARD, SIZES, WAYS, cells, differences, figures, floor, page_of, table

BENCHMARK = Path(__file__).with_name("bench_fp8.py")
PYTHON = Path(__file__).parents[2] / "tools/pretrain/.venv/bin/python"


def cell(way: str, seed: int, loss: float, *, hard: bool = False) -> dict:
    found = {"way": way, "seed": seed, "hard": hard, "loss": loss, "seconds": 1.0, "curve": [5.0, loss]}
    if way not in ("fp32", "bf16"):
        found |= {"clipped": 0.0, "underflow": 0.001, "fallbacks": 0}
    return found


FOUND = {
    "bf16-1": cell("bf16", 1, 2.0),
    "bf16-2": cell("bf16", 2, 2.02),
    "blockwise-1": cell("blockwise", 1, 2.002),
    "blockwise-2": cell("blockwise", 2, 2.022),
    "tensorwise-1": cell("tensorwise", 1, 2.02),
    "delayed-3": cell("delayed", 3, 2.0),  # whose bf16 run is not there yet
    "hard-bf16-1": cell("bf16", 1, 3.0, hard=True),
    "hard-blockwise-1": cell("blockwise", 1, 3.3, hard=True),
}


def test_there_is_a_cell_for_every_way_and_seed() -> None:
    found = cells(3)
    assert len({each.name for each in found}) == len(found) == 3 * len(WAYS) + len(HARD)
    assert {each.way for each in found[: len(WAYS)]} == set(WAYS)  # a whole table as early as possible


def test_differences_are_from_bf16_with_the_same_seed() -> None:
    assert differences(FOUND, "blockwise", hard=False) == pytest.approx([0.001, 0.002 / 2.02])
    assert differences(FOUND, "blockwise", hard=True) == pytest.approx([0.1])
    assert differences(FOUND, "delayed", hard=False) == []
    assert floor(FOUND) == pytest.approx([1 - 2.0 / 2.02])


def test_the_table_says_which_goal_is_met() -> None:
    rows = {row[0]: row for row in table(FOUND)}
    assert rows["blockwise"][3] == "0.25%, met"
    assert rows["tensorwise"][3] == "0.50%, missed"
    assert rows["delayed"][3] == ""
    assert rows["blockwise, outlier channels"][2] == "+10.00%"
    assert rows["bf16, seeds against each other"][2] == "0.99%"
    assert "fp32" not in rows
    assert len({len(row) for row in rows.values()}) == 1
    page = page_of(FOUND, {"device": "CPU"}, 2)
    assert page.count("<svg") == 2
    assert "0.50%, missed" in page


def test_the_model_to_show_has_twenty_million_parameters() -> None:
    from shared.families import registry

    assert registry.from_config(SIZES["20m"].config()).parameter_count() > 20e6


def test_cells_are_trained_once_and_go_on(tmp_path: Path) -> None:
    """The hard case on a tiny model, with and without the guard."""
    words = [
        "--work",
        tmp_path,
        "--size",
        "tiny",
        "--updates",
        "4",
        "--seeds",
        "1",
        "--only",
        "hard-tensorwise",
        "--record",
    ]
    command = [PYTHON, BENCHMARK, *words, "--results", tmp_path / "results"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").glob("*.json")
    found = json.loads(file.read_text())["cells"]
    assert {each["way"] for each in found.values()} == {"tensorwise", "tensorwise without guard"}
    assert found["hard-tensorwise-1"]["fallbacks"] > 0
    assert found["hard-tensorwise-without-guard-1"]["fallbacks"] == 0
    # Of all linear layers of a decoder layer; most of linear_qkv.
    assert found["hard-tensorwise-1"]["underflow"] > 0.05
    assert all(len(each["curve"]) == 4 for each in found.values())
    assert "tensorwise without guard, outlier channels" in done.stdout
    again = figures(tmp_path / "tiny", 4, 1)
    assert again == found
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").rglob("manifest.json")}
    subprocess.run([PYTHON, BENCHMARK, *words[:-1]], env=environment, capture_output=True, check=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").rglob("manifest.json")} == runs
