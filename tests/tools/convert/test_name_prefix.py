"""Names under a wrapper's prefix are refused with the fix, and read with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file


def model(convert: Any, place: Path, size: str) -> dict[str, np.ndarray]:
    assert convert("init", "--size", size, "--dtype", "fp32", "--target", place).code == 0
    (place / "manifest.json").unlink()
    return load_file(place / "model.safetensors")


@pytest.mark.parametrize("size", ["tiny", "gpt2-tiny", "qwen3-moe-tiny"])
@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "_fsdp_wrapped_module.",
        "pretrained_model.",
        "base_model.model.",
        "model.module.",
        "a.b.",
    ],
)
def test_prefix_is_named_and_stripped(convert: Any, tmp_path: Path, size: str, prefix: str) -> None:
    weights = model(convert, tmp_path / "hf", size)
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    if prefix == "pretrained_model.":
        wrapped["v_head.summary.weight"] = np.ones((1, 64), dtype=np.float32)
    save_file(wrapped, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    command = ("to-megatron", "--source", tmp_path / "hf", "--target", tmp_path / "mg")
    refused = convert(*command)
    assert refused.code == 2
    assert refused.err.strip().endswith(f"--strip-prefix {prefix}")
    assert convert(*command, "--strip-prefix", "other.").code == 2
    done = convert(*command, "--strip-prefix", prefix)
    assert done.code == 0, done.err
    assert ("left out, TRL's value head: v_head.summary.weight" in done.err) == (prefix == "pretrained_model.")
    assert json.loads((tmp_path / "mg" / "manifest.json").read_text())["facts"]["stripped_prefix"] == prefix
    assert convert("verify", "--source", tmp_path / "hf", "--target", tmp_path / "mg", "--no-logits").code == 0
    assert convert("to-hf", "--source", tmp_path / "mg", "--target", tmp_path / "back").code == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [
        (r"^model\.", "_orig_mod."),  # the inner model was compiled
        (r"^model\.layers\.\d+\.", "_checkpoint_wrapped_module."),
        (r"^model\.layers\.\d+\.|^", "_fsdp_wrapped_module."),  # and the whole model
    ],
)
def test_wrapper_within_names_is_named_and_stripped(convert: Any, tmp_path: Path, pattern: str, prefix: str) -> None:
    weights = model(convert, tmp_path / "hf", "tiny")
    within = {re.sub(pattern, rf"\g<0>{prefix}", name, count=1): tensor for name, tensor in weights.items()}
    if pattern.endswith("^"):
        within = {prefix + name.removeprefix(prefix): tensor for name, tensor in within.items()}
    save_file(within, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    command = ("to-megatron", "--source", tmp_path / "hf", "--target", tmp_path / "mg")
    refused = convert(*command)
    assert refused.code == 2
    assert refused.err.strip().endswith(f"--strip-prefix {prefix}")
    assert convert(*command, "--strip-prefix", prefix).code == 0
    assert convert("to-hf", "--source", tmp_path / "mg", "--target", tmp_path / "back").code == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], tensor) for name, tensor in weights.items())


def test_adapter_that_is_not_merged_is_named(convert: Any, tmp_path: Path) -> None:
    weights = model(convert, tmp_path / "hf", "tiny")
    wrapped = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    save_file(wrapped | {name: np.ones((4, 64), np.float32)}, tmp_path / "hf" / "model.safetensors")
    refused = convert("to-megatron", "--source", tmp_path / "hf", "--target", tmp_path / "mg")
    assert refused.code == 2
    assert f"{name} is of an adapter that is not merged into its base" in refused.err
