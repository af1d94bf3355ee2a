"""The benchmark's arithmetic, and its answer where there is no GPU; `make bench-fp8-gpu` gives the figures."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks import bench_fp8_gpu
from tests.benchmarks.bench_fp8_gpu import RECIPES, experts, fusions, seconds_to, updates

BENCHMARK = Path(__file__).with_name("bench_fp8_gpu.py")
PYTHON = Path(__file__).parents[2] / "tools/pretrain/.venv/bin/python"


def rows(losses: list[float], seconds: float) -> list[dict[str, float]]:
    return [{"loss": loss, "seconds": seconds} for loss in losses]


def test_time_to_a_loss_is_that_of_the_first_window_below_it() -> None:
    falling = rows([5.0, 4.0, 3.0, 2.0, 1.0], 2.0)
    assert seconds_to(falling, 2.5, 2) == 8.0
    assert seconds_to(falling, 5.0, 1) == 2.0
    assert seconds_to(falling, 0.5, 2) is None


def test_the_table_is_beside_bf16() -> None:
    plain = rows([3.0 - 0.1 * step for step in range(20)], 2.0)
    faster = rows([row["loss"] * 1.001 for row in plain], 1.0)
    found = list(updates({"bf16": plain, "tensorwise": rows([1.0] * 20, 1.0), "blockwise": faster}, tokens=100))
    assert found[0] == ["bf16", "50", "", "1.1500", "", "40 s", ""]
    assert found[1][1:] == ["100", "2.00 x, goal 1.25", "1.0000", "-13.04%, goal 0.5%", "2 s", "20.00 x as fast"]
    assert found[2][4:] == ["+0.10%, goal 0.5%", "not reached", ""]


def test_every_recipe_is_in_the_tables_of_fusions_and_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they call runs, once, on a CPU; the times are a GPU's."""
    monkeypatch.setattr(bench_fp8_gpu, "milliseconds", lambda work: 2.0 if work() is not None else 0.0)
    found = list(fusions("cpu", tokens=16, hidden=32, ffn=48))
    assert [row[0] for row in found[:4]] == [f"SwiGLU of 48, {name}" for name in RECIPES]
    assert [row[0] for row in found[4:8]] == [f"RMSNorm of 32, {name}" for name in RECIPES]
    assert {row[3] for row in found} == {"1.00 x as fast"}
    assert len(found) == 10
    rows_ = list(experts("cpu", rows=(3, 0, 5), inputs=32, outputs=48))
    assert rows_[0] == ["bf16, grouped", "2.00", ""]
    ways = [
        f"{name} {kind}, {way}" for name in RECIPES for kind in ("hybrid", "e4m3") for way in ("one by one", "grouped")
    ]
    assert [row[0] for row in rows_[1:]] == ways


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [PYTHON, BENCHMARK, "--work", tmp_path / "work"]
    done = subprocess.run(
        command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["bench-fp8-gpu: there is no GPU of compute capability 8.9 or higher here"]
    assert done.stdout == ""
    assert not (tmp_path / "work").exists()
