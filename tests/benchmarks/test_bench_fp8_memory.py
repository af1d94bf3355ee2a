"""The benchmark's table on a tiny model; `make bench-fp8-memory` gives the figures."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

BENCHMARK = Path(__file__).with_name("bench_fp8_memory.py")
PYTHON = Path(__file__).parents[2] / "tools/pretrain/.venv/bin/python"


def test_fp8_keeps_half_of_what_linear_layers_read() -> None:
    command = [PYTHON, BENCHMARK, "--hidden", "64", "--tokens", "128"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    titles, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines())
    assert titles[1] == "bytes per token and layer"
    found = {row[0]: float(row[1].replace(",", "")) for row in rows}
    # Inputs of qkv, fc1 and fc2 (ffn 3 hidden) become a byte an element, that of proj one more: attention keeps it in bf16.
    wanted = found["bf16"] - 64 * (1 + 1 + 3 - 1)
    # And scales: a number of four layers; one per row and column; one per 128.
    assert abs(found["tensorwise"] - wanted) < 1
    assert wanted < found["blockwise"] <= found["rowwise"] <= wanted + 4 * 64
