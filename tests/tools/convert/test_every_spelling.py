"""Models with legacy config.json fields: converted unchanged, and returned byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.families import registry

# Today's names to those of old, and what else is said; None: a field that the old spelling lacks.
_FALCON = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_kv_heads": "n_head_kv"}
_QWEN = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "ffn_hidden_size",
    "emb_dropout_prob": "embd_pdrop",
    "attn_dropout_prob": "attn_pdrop",
}
_MPT = {"alibi": True, "alibi_bias_max": 16, "attn_type": "multihead_attention", "attn_impl": "torch"}
FIRST: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "falcon-tiny": (_FALCON, {"model_type": "RefinedWebModel", "architectures": ["RWForCausalLM"]}),
    "falcon-tiny-new": (
        _FALCON,
        {"model_type": "RefinedWeb", "architectures": ["RWForCausalLM"], "new_decoder_architecture": None},
    ),
    "tiny": ({"max_position_embeddings": "max_sequence_length"}, {"architectures": ["LLaMAForCausalLM"]}),
    "phi3-tiny-longrope": ({}, {"rope_parameters": None, "pad_token_id": 0}),
    "stablelm-tiny": (
        {"layer_norm_eps": "norm_eps", "partial_rotary_factor": "rope_pct"},
        {"model_type": "stablelm_epoch", "architectures": ["StableLMEpochForCausalLM"], "rope_parameters": None},
    ),
    "mpt-tiny-clipped": ({}, {"attn_config": _MPT | {"clip_qkv": 2}}),
    "qwen-tiny": (_QWEN, {"model_type": None, "pos_emb": "rotary", "padded_vocab_size": 509}),
}


def first_spelling(config: dict[str, Any], size: str) -> dict[str, Any]:
    names, further = FIRST[size]
    spelt = {names.get(name, name): value for name, value in config.items()} | further
    if scaling := spelt.get("rope_scaling"):
        spelt["rope_scaling"] = {name: value for name, value in scaling.items() if name != "rope_type"} | {"type": "su"}
    return {name: value for name, value in spelt.items() if value is not None}


@pytest.mark.parametrize("size", FIRST)
def test_first_spellings_are_converted_and_come_back_to_the_byte(
    size: str, write_architecture: Any, convert: Any, tmp_path: Path
) -> None:
    source, target, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    architecture = replace(registry.sizes()[size], vocab_size=509)
    write_architecture(source, architecture)
    config = json.loads((source / "config.json").read_text())
    first = json.dumps(first_spelling(config, size), indent=4) + "\n"
    (source / "config.json").write_text(first)
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    # Code that reads Qwen's names of old is not to be had here.
    answer = convert("verify", "--source", source, "--target", target, *(["--no-logits"] * (size == "qwen-tiny")))
    assert answer.code == 0, answer.err
    assert convert("to-hf", "--source", target, "--target", back).code == 0
    for file in (file for file in source.rglob("*") if file.is_file()):
        assert (back / file.relative_to(source)).read_bytes() == file.read_bytes(), file
    assert registry.from_config(json.loads(first)) == architecture
    today = tmp_path / "today"  # for programs that know no other spelling
    assert convert("to-hf", "--source", target, "--target", today, "--family", architecture.family).code == 0
    found = json.loads((today / "config.json").read_text())
    family = registry.FAMILIES[architecture.family]
    assert (found["model_type"], found["architectures"]) == (family.model_types[0], [family.hf_class])
    assert json.dumps(family.without_legacy_names(found)) == json.dumps(found)
    assert registry.from_config(found) == architecture
    assert (today / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_todays_spelling_is_left_as_it_is(write_architecture: Any, convert: Any, tmp_path: Path) -> None:
    source = write_architecture(tmp_path / "hf", registry.sizes()["falcon-tiny"])
    target, back = tmp_path / "megatron", tmp_path / "back"
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    assert convert("to-hf", "--source", target, "--target", back, "--family", "falcon").code == 0
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
