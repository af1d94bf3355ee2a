"""`inspect` of complete and damaged directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Make = Callable[..., Path]


def test_hugging_face_directory(make_hf: Make, convert: Any) -> None:
    answer = convert("inspect", make_hf("llama-fp32-norms"), "--json", "--tensors")
    assert answer.code == 0
    found = json.loads(answer.out)
    assert (found["kind"], found["family"], found["tensors"]) == ("hf", "llama", 21)
    assert found["numbers"]["float32"] == 5 * 64
    assert found["parameters"] == sum(found["numbers"].values())
    assert found["architecture"]["layers"][0]["mixer"]["groups"] == 2
    assert found["made_by"] == "another program (no manifest.json)"
    assert found["tensor_list"]["model.norm.weight"] == {"dtype": "float32", "shape": [64]}
    assert "problem" not in found


def test_megatron_directory(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    convert("to-megatron", "--source", make_hf(), "--target", tmp_path / "megatron")
    answer = convert("inspect", "--source", tmp_path / "megatron", "--json")
    found = json.loads(answer.out)
    assert (found["kind"], found["family"], found["iteration"]) == ("megatron", "llama", "release")
    assert found["made_by"].startswith("convert to-megatron")
    assert found["parents"][0].startswith("source: hf")


def test_table_for_people(make_hf: Make, convert: Any) -> None:
    answer = convert("inspect", make_hf(), "--tensors")
    assert answer.code == 0
    for words in ("llama", "bfloat16", "2 layers, hidden_size 64", "model.layers.1.mlp.up_proj.weight", "[160, 64]"):
        assert words in answer.out


def test_problem_is_said(make_hf: Make, convert: Any) -> None:
    source = make_hf()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    found = json.loads(convert("inspect", source, "--json").out)
    assert "model.layers.2.input_layernorm.weight" in found["problem"]


@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_scan_finds_what_is_not_finite(
    make_hf: Make, convert: Any, tmp_path: Path, overwrite_tensor: Any, form: str
) -> None:
    source = make_hf()

    def poison(bits: np.ndarray) -> np.ndarray:
        changed = bits.copy()
        changed[3] = 0x7F80
        return changed

    assert convert("inspect", source, "--scan").code == 0
    overwrite_tensor(source / "model.safetensors", "model.norm.weight", poison)
    convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    answer = convert("inspect", source if form == "hf" else tmp_path / "megatron", "--scan")
    assert answer.code == 1
    assert "norm.weight holds 0 NaN, 1 infinite" in answer.err
