"""Weights under the names of transformers 5's classes: `save_pretrained(save_original_format=False)`, over the registry.

The classes hold the experts of a layer as one tensor, and some have other names for routers, heads and towers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from shared.checkpoint.formats.hugging_face import HfReader
from shared.checkpoint.formats.torch_dist_reader import TorchDistReader
from shared.families import registry
from shared.weight_account import account_for_weights

# One of each family that stores other names than its class holds.
SIZES = {
    registry.sizes()[name].family: name
    for name in (
        *("mixtral-tiny", "qwen2-moe-tiny", "qwen3-moe-tiny-mixed", "qwen3-next-tiny", "deepseek-v2-tiny"),
        *("deepseek-v3-tiny", "glm4-moe-tiny", "gpt-neox-tiny", "gemma3-images-tiny"),
    )
}


def test_every_family_with_experts_per_tensor_is_listed() -> None:
    stacked = {name for name, family in registry.FAMILIES.items() if family.names.stacked_experts}
    assert {size.family for size in registry.sizes().values() if size.moe} - stacked <= SIZES.keys()


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def stacked(directory: Path) -> dict[str, tuple[Any, ...]]:
    reader = TorchDistReader(directory / "release")
    return {
        key: (t.dtype, t.shape, b"".join(map(bytes, reader.rows(key, (), 0, t.shape[0]))))
        for key, t in reader.tensors.items()
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", SIZES.values())
def test_names_of_the_class_are_read_and_come_back(
    write_architecture: Any, convert: Any, tmp_path: Path, name: str
) -> None:
    size = registry.sizes()[name]
    auto = AutoModelForImageTextToText if size.vision else AutoModelForCausalLM
    model = auto.from_pretrained(write_architecture(tmp_path / "source", size), dtype=torch.bfloat16)
    held, published = tmp_path / "class", tmp_path / "published"
    model.save_pretrained(held, save_original_format=False)
    model.save_pretrained(published)  # without MTP layers, as the class
    assert HfReader(held).tensors.keys() != HfReader(published).tensors.keys()
    assert account_for_weights(held, f"--source {held}")

    def to(kind: str, source: Path) -> Path:
        target = tmp_path / f"{source.name}.{kind}"
        answer = convert(f"to-{kind}", "--source", source, "--target", target)
        assert answer.code == 0, answer.err
        return target

    for kind in ("megatron", "te"):
        target, back = to(kind, held), tmp_path / f"{kind}.back"
        answer = convert("verify", "--source", held, "--target", target, "--no-logits")
        assert answer.code == 0, answer.err
        assert convert("to-hf", "--source", target, "--target", back).code == 0
        assert equal(tensors(back), tensors(held))
    assert stacked(tmp_path / "class.megatron") == stacked(to("megatron", published))
