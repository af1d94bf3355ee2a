"""Names under a wrapper's prefix are refused with the mend, and read with it."""

from __future__ import annotations

import json
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
    assert json.loads((tmp_path / "mg" / "manifest.json").read_text())["facts"]["stripped_prefix"] == prefix
    assert convert("verify", "--source", tmp_path / "hf", "--target", tmp_path / "mg", "--no-logits").code == 0
    assert convert("to-hf", "--source", tmp_path / "mg", "--target", tmp_path / "back").code == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], tensor) for name, tensor in weights.items())
