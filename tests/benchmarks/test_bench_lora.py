"""The memory of LoRA is what its parameters take; `make bench-lora` measures a real size."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from shared.families import registry
from shared.mapping.adapters import adapted_linears

BENCHMARK = Path(__file__).with_name("bench_lora.py")
PYTHON = Path(__file__).parents[2] / "tools/pretrain/.venv/bin/python"


def test_bytes_are_those_of_the_parameters(tmp_path: Path) -> None:
    words = [PYTHON, BENCHMARK, "--size=tiny", "--rank=4", "--length=16", "--results", tmp_path, "--record"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    found = json.loads((tmp_path / "lora-cpu.json").read_text())["results"]["tiny, rank 4"]
    architecture = registry.sizes()["tiny"]
    linears = adapted_linears(registry.table_of(architecture), ("all-linear",)).values()
    shapes = [shape for linear in linears for shape in linear.tensors(4).values()]
    adapters = sum(shape[-2] * shape[-1] for shape in shapes)
    whole = architecture.parameter_count()
    for precision, size in (("bf16", 2), ("fp32", 4)):
        full, lora = found[f"{precision}, whole"], found[f"{precision}, LoRA"]
        assert (full["trained"], lora["trained"]) == (whole, adapters)
        assert lora["weights"] - full["weights"] == size * adapters
        main = 4 * (size == 2)  # fp32 weights beside bf16 ones
        for figures in (full, lora):
            trained = figures["trained"]
            assert 4 * trained <= figures["gradients"] < 4.2 * trained + 4096  # padded
            assert (8 + main) * trained <= figures["optimizer"] < (8 + main) * 1.05 * trained + 8192
            assert figures["checkpoint"] > (8 + main + size * (figures is lora)) * trained
    assert "| bf16, LoRA | " in answer.stdout
