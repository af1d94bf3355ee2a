"""Libraries imported by a conversion, per family: none if only rows are reordered, numpy for transposes and casts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.architecture.architecture import Architecture
from shared.families import registry

PROGRAM = """
import json, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))  # None: cannot be imported
from tools.convert.cli import tool
for words in json.loads(sys.argv[2]):
    try:
        tool.run(words)
    except SystemExit as ended:
        assert not ended.code, words
"""
ABSENT = ["torch", "megatron", "transformer_engine", "transformers", "safetensors", "tokenizers"]


def moves_numbers(a: Architecture) -> bool:
    """Whether something of it is more than a permutation of rows: turned, dealt out one by one, or held less one."""
    entries = registry.table_of(a).entries()
    return any(e.transposed or e.zero_centered_gamma or any(s.step > 1 for s in e.segments) for e in entries)


@pytest.mark.parametrize("numbers", [False, True])
def test_both_forms_and_back_without_a_tensor_library(
    tiny_sizes: dict[str, Architecture], write_architecture: Any, tmp_path: Path, numbers: bool
) -> None:
    sizes = {name: a for name, a in tiny_sizes.items() if moves_numbers(a) == numbers}
    words: list[list[str]] = []
    for name, architecture in sizes.items():
        source = write_architecture(tmp_path / name, architecture)
        for command, target in (("to-megatron", f"{source}.mg"), ("to-te", f"{source}.te")):
            words.append([command, "--source", str(source), "--target", target])
            words.append(["to-hf", "--source", target, "--target", f"{target}.hf"])
    absent = ABSENT if numbers else [*ABSENT, "numpy"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(absent), json.dumps(words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name in sizes:
        wanted = (tmp_path / name / "model.safetensors").read_bytes()
        for form in ("mg", "te"):
            assert (tmp_path / f"{name}.{form}.hf" / "model.safetensors").read_bytes() == wanted, (name, form)
