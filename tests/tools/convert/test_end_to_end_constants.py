"""Norms without weights: constants in the Megatron directory, and stored tensors that the model does not use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.architecture.architecture import Architecture
from shared.families import registry
from shared.parallel import ParallelConfig
from shared.runtime.process_groups import initialize

NORMS = ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")


@pytest.fixture
def architecture() -> Architecture:
    return registry.sizes()["galactica-tiny"]


@pytest.fixture
def source(architecture: Architecture, write_architecture: Any, tmp_path: Path) -> Path:
    return Path(write_architecture(tmp_path / "hf", architecture))


def test_they_are_one_and_zero_and_nothing_trains_them(source: Path, convert: Any, tmp_path: Path) -> None:
    from shared.model import gpt, weights

    target = tmp_path / "megatron"
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    initialize(ParallelConfig(), seed=0)
    (chunk,) = gpt.build(registry.sizes()["galactica-tiny"], ParallelConfig(), dtype=torch.bfloat16)
    for buffer in chunk.buffers():
        buffer.fill_(7.0)
    weights.load([chunk], target / "release")
    found = {name: tensor for name, tensor in chunk.state_dict().items() if "norm" in name and tensor is not None}
    assert len(found) == 2 * (2 * 2 + 1)
    for name, tensor in found.items():
        assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("weight")))), name
    assert not found.keys() & dict(chunk.named_parameters()).keys()


def test_files_that_have_them_get_them_back_and_nothing_reads_them(
    source: Path, architecture: Architecture, convert: Any, tmp_path: Path
) -> None:
    stored = load_file(source / "model.safetensors")
    for layer in range(architecture.num_layers):
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            stored[f"model.decoder.layers.{layer}.{name}.weight"] = torch.randn(64).bfloat16()
    stored["model.decoder.final_layer_norm.bias"] = torch.randn(64).bfloat16()
    save_file(stored, source / "model.safetensors")
    before = (source / "model.safetensors").read_bytes()
    for form in ("megatron", "te"):
        target, back = tmp_path / form, tmp_path / f"{form}.back"
        assert convert(f"to-{form}", "--source", source, "--target", target).code == 0
        answer = convert("verify", "--source", source, "--target", target)  # transformers passes over them, too
        assert answer.code == 0, answer.err
        assert convert("to-hf", "--source", target, "--target", back).code == 0
        assert load_file(back / "model.safetensors").keys() == stored.keys()
        assert (back / "model.safetensors").read_bytes() == before


def test_trained_ones_are_refused(source: Path, convert: Any, tmp_path: Path) -> None:
    target = tmp_path / "megatron"
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    ones = torch.ones(64, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    (file,) = (path for path in sorted(target.rglob("*.distcp")) if ones in path.read_bytes())
    data = file.read_bytes()
    place = data.index(ones) + len(ones) - 1
    file.write_bytes(data[:place] + b"\x40" + data[place + 1 :])
    (target / "manifest.json").unlink()  # as another program's
    answer = convert("to-hf", "--source", target, "--target", tmp_path / "back")
    assert answer.code == 2
    assert "layer_norm_weight is not one, but the model has no such parameter: its values would be lost" in answer.err
    assert not (tmp_path / "back").exists()
    answer = convert("verify", "--source", source, "--target", target)
    assert answer.code == 1
    assert "layer_norm_weight is not one, but the model has no such parameter" in answer.err
