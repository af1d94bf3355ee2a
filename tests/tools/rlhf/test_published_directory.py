"""What a command publishes: names, layout and dtypes of the source; tensors that the class does not hold, byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tools.rlhf.models import load_policy, open_source
from tools.rlhf.published_directory import save_hf

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 8}
LATENT = {
    "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "num_key_value_heads": 2,
}  # fmt: skip


def republished(
    world: Any, directory: Path, model: Any, change: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors of a source with changed names, and of what is published after all weights have grown by one."""
    source, target = directory / "source", directory / "target"
    model.save_pretrained(source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world.policy / file, source)
    weights = change(load_file(source / "model.safetensors"))
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    opened = open_source(source)
    trained = load_policy(opened, torch.float32)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 1
    target.mkdir()
    facts = save_hf(trained, target, opened)
    found = load_file(target / "model.safetensors")
    assert facts["tensors"] == len(found)
    assert all(torch.equal(found[name], weights[name]) for name in facts["tensors_unchanged"])
    trained_names = weights.keys() - set(opened.aside) - {name for name, _ in trained.named_buffers()}
    assert all(torch.equal(found[n], weights[n] + 1) for n in trained_names & found.keys())
    again = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trained.parameters(), strict=True))
    assert open_source(target).aside == opened.aside
    return weights, found


def test_names_without_the_prefix_and_masks_of_old_files(world, tmp_path):
    """As GPT-2 was published: `h.0...`, with the causal masks."""
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=96, bos_token_id=1, eos_token_id=1)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()

    def change(weights):
        return {n.removeprefix("transformer."): t for n, t in weights.items()} | {"h.1.attn.bias": mask}

    weights, found = republished(world, tmp_path, transformers.GPT2LMHeadModel(config), change)
    assert found.keys() == weights.keys()
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in weights.items()}


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_stay_stacked_or_apart(world, tmp_path, stacked):
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES | EXPERTS))
    whole = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    weights, found = republished(world, tmp_path, model, lambda weights: whole if stacked else weights)
    assert any(name.endswith("experts.gate_up_proj") for name in found) == stacked
    assert found.keys() == weights.keys()


def test_a_stored_copy_of_the_embedding_follows_it(world, tmp_path):
    """Of the output head, and of an MTP layer, which a class ignores under the number that is its default."""
    config = transformers.DeepseekV3Config(**SIZES | LATENT, num_nextn_predict_layers=1, tie_word_embeddings=True)
    model = transformers.DeepseekV3ForCausalLM(config)

    def change(weights):
        layer = {
            n.replace("layers.1.", "layers.2."): t + 3 for n, t in weights.items() if n.startswith("model.layers.1.")
        }
        further = {n: torch.randn(16) for n in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
        further |= {"eh_proj.weight": torch.randn(16, 32)}
        copies = ("lm_head.weight", "model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight")
        return (
            weights
            | layer
            | {f"model.layers.2.{n}": t for n, t in further.items()}
            | {n: weights["model.embed_tokens.weight"].clone() for n in copies}
        )

    weights, found = republished(world, tmp_path, model, change)
    assert found.keys() == weights.keys()
    assert "model.layers.2.mlp.experts.0.up_proj.weight" in found
    for name in ("lm_head.weight", "model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"):
        assert torch.equal(found[name], weights["model.embed_tokens.weight"] + 1), name


def test_layers_that_a_class_ignores_are_kept(world, tmp_path):
    """A family without a table here: the class ignores `mtp.` without a word."""
    delta = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
    config = transformers.Qwen3_5TextConfig(
        **SIZES | delta, head_dim=8, num_key_value_heads=1, linear_num_key_heads=1, linear_num_value_heads=2
    )
    mtp = {"mtp.fc.weight": torch.randn(16, 32), "mtp.layers.0.mlp.up_proj.weight": torch.randn(24, 16)}
    weights, found = republished(
        world, tmp_path, transformers.Qwen3_5ForCausalLM(config), lambda weights: weights | mtp
    )
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], mtp[name]) for name in mtp)
