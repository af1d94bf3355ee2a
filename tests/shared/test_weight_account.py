"""A tensor that is missing, unknown or misshapen is named before an engine starts, whatever the family."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.families import registry
from shared.weight_account import account_for_weights as account

SIZES = [name for name in registry.sizes() if name.endswith("-tiny")]
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}


def write(directory: Path, weights: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def account_for_weights(source: Path) -> bool:
    return account(source, f"--source {source}")


def refused_without_one(source: Path, weights: dict[str, torch.Tensor]) -> None:
    """The whole directory passes; without a tensor, with another shape of it, and with one more it is refused by name."""
    account_for_weights(write(source, weights))
    name = random.Random(len(weights)).choice(sorted(weights))
    for changed, said in (
        ({n: t for n, t in weights.items() if n != name}, name),
        (weights | {name: torch.zeros(7, *weights[name].shape[1:], dtype=weights[name].dtype)}, name),
        (weights | {"model.one_more.weight": torch.zeros(3)}, "model.one_more.weight"),
    ):
        with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
            account_for_weights(write(source, changed))
        assert said in str(caught.value)


@pytest.mark.parametrize("size", SIZES)
def test_every_family_accounts_for_its_tensors(size, tmp_path):
    architecture = registry.sizes()[size]
    table = registry.table_of(architecture)
    shapes = {source.name: source.stored_shape for entry in table.entries() for source in entry.sources}
    shapes |= table.required_pass_through()
    (tmp_path / "config.json").write_text(json.dumps(registry.to_config(architecture)))
    refused_without_one(tmp_path, {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()})


@pytest.mark.parametrize("family", ["nemotron", "persimmon", "arcee"])
def test_the_class_accounts_for_a_family_without_a_table(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    assert family not in registry.FAMILIES
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CONFIG)).save_pretrained(tmp_path)
    refused_without_one(tmp_path, load_file(tmp_path / "model.safetensors"))


def test_experts_in_one_tensor_are_left_to_the_class(tmp_path):
    """As a program that skips transformers' renaming writes them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **CONFIG, **sizes))
    model.save_pretrained(tmp_path)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in weights)
    account_for_weights(write(tmp_path, weights))
    del weights["model.layers.1.mlp.experts.gate_up_proj"]
    with pytest.raises(UserError, match="missing"):
        account_for_weights(write(tmp_path, weights))
