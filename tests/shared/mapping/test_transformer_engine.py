"""TransformerEngine parameter names and shapes, and reasons for layers that TransformerLayer does not support."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from shared.architecture.architecture import Architecture, Attention
from shared.families import registry
from shared.mapping import transformer_engine_modules as te
from shared.mapping.transformer_engine import Form, te_form


def form_of(a: Architecture) -> Form:
    return te_form(registry.table_of(a), a)


def shapes_of(form: Form) -> dict[str, tuple[int, ...]]:
    return {entry.key: entry.shape for entry in form.table.entries()}


def size(name: str, **changes: Any) -> Architecture:
    return registry.sizes()[name].with_values(**changes)


def test_llama() -> None:
    """As `TransformerLayer(fuse_qkv_params=True, normalization="RMSNorm", activation="swiglu", bias=False)` registers them."""
    one = size("tiny", vocab_size=509)
    shapes = shapes_of(form_of(replace(one, layers=one.layers[:1])))
    assert shapes == {
        "embedding.weight": (509, 64),  # not padded
        "layers.0.self_attention.layernorm_qkv.layer_norm_weight": (64,),
        "layers.0.self_attention.layernorm_qkv.weight": (128, 64),
        "layers.0.self_attention.proj.weight": (64, 64),
        "layers.0.layernorm_mlp.layer_norm_weight": (64,),
        "layers.0.layernorm_mlp.fc1_weight": (320, 64),
        "layers.0.layernorm_mlp.fc2_weight": (64, 160),
        "final_norm.weight": (64,),
        "output_layer.weight": (509, 64),
    }


def test_layers_with_experts_and_without() -> None:
    form = form_of(size("qwen3-moe-tiny-mixed"))
    layers = form.modules["layers"]
    whole = [index for index, layer in enumerate(layers) if "class" in layer]
    sparse = [index for index, layer in enumerate(layers) if layer.get("because") == ["MoE"]]
    assert sorted(whole + sparse) == list(range(len(layers)))
    assert whole
    modules = layers[sparse[0]]["modules"]
    assert modules["self_attention"]["class"] == f"{te.TE}MultiheadAttention"
    experts = modules["mlp.experts.linear_fc1"]
    count = experts["arguments"]["num_gemms"]
    assert experts["class"] == f"{te.TE}GroupedLinear"
    shapes = shapes_of(form)
    assert [f"layers.{sparse[0]}.mlp.experts.linear_fc1.weight{i}" in shapes for i in range(count)] == [True] * count


@pytest.mark.parametrize(
    ("name", "changes", "because"),
    [
        ("gemma2-tiny", {}, "softcap of scores 5.0"),
        ("gemma2-tiny", {}, "norm placement sandwich"),
        ("granite-tiny", {}, "residual multiplier"),
        ("granite-tiny", {}, "softmax scale"),
        ("olmo2-tiny", {}, "qk_norm by projection"),
        ("olmo2-tiny", {}, "no norm before the MLP"),
        ("gpt-neox-tiny", {}, "exact GELU"),
        ("gptj-tiny", {}, "one norm for attention and MLP"),
        ("deepseek-v3-tiny", {}, "MLA"),
        ("qwen3-tiny-yarn", {}, "concentration factor of cos and sin"),
        ("qwen3-tiny", {"norm": {"zero_centered_gamma": True}}, "qk_norm with zero-centred gamma"),
        ("gpt-neox-tiny", {"residual": {"dropout": 0.1}}, "parallel residual with dropout"),
    ],
)
def test_what_transformer_engine_lacks_is_said(name: str, changes: dict[str, Any], because: str) -> None:
    for layer in form_of(size(name, **changes)).modules["layers"]:
        assert any(because in reason for reason in layer["because"])


@pytest.mark.parametrize(
    "name", ["tiny", "qwen2-tiny", "qwen3-tiny", "gemma-tiny", "mistral-tiny", "bloom-tiny", "gpt2-tiny"]
)
def test_what_transformer_engine_has_is_whole(name: str) -> None:
    assert all(layer["class"] == f"{te.TE}TransformerLayer" for layer in form_of(size(name)).modules["layers"])


def test_a_field_that_nobody_has_looked_into_counts_as_lacking() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(Attention):
        surprise: bool = False

    plain = size("tiny")
    assert isinstance(plain.attention, Attention)
    later = Later(**vars(plain.attention), surprise=True)
    limits = te.limits(plain.with_layers(lambda layer: replace(layer, mixer=later)))
    assert "Later.surprise True" in limits.attention
    assert "Later.surprise True" in limits.mlp
    assert "Later.surprise True" in limits.layer
    assert te.limits(plain).all == ()


def test_fields_that_are_named_exist() -> None:
    for value, names in te._EXPRESSED.items():
        assert {field.name for field in fields(value)} >= names


def arguments_of(a: Architecture) -> Iterator[dict[str, Any]]:
    for layer in form_of(a).modules["layers"]:
        yield layer["arguments"]


def test_a_window_counts_the_tokens_to_the_left() -> None:
    a = size("mistral-tiny")
    assert isinstance(a.attention, Attention)
    assert a.attention.window is not None
    assert [given["window_size"] for given in arguments_of(a)] == [[a.attention.window - 1, 0]] * a.num_layers
    mixed = replace(a, layers=(a.layers[0], a.with_values(attention={"window": None}).layers[1]))
    assert next(given["window_size"] for given in list(arguments_of(mixed))[1:]) is None


def test_rotation_by_kind_of_layer_is_in_each_layers_call() -> None:
    a = size("mistral-tiny")
    local = size("mistral-tiny", rotary={"theta": 500.0})
    mixed = replace(a, layers=(local.layers[0], a.with_values(attention={"window": None}).layers[1]))
    thetas = [layer["call"]["rotary_pos_emb"]["theta"] for layer in form_of(mixed).modules["layers"]]
    assert a.attention.rotary is not None
    assert thetas == [500.0, a.attention.rotary.theta]


def test_parts_are_recognised() -> None:
    modules = form_of(size("olmo2-tiny")).modules["layers"][0]["modules"]
    assert {path: module["class"].removeprefix(te.TE) for path, module in modules.items()} == {
        "self_attention.qkv": "Linear",
        "self_attention.q_norm": "RMSNorm",
        "self_attention.k_norm": "RMSNorm",
        "self_attention.proj": "Linear",
        "post_self_attn_layernorm": "RMSNorm",
        "mlp.linear_fc1": "Linear",
        "mlp.linear_fc2": "Linear",
        "post_mlp_layernorm": "RMSNorm",
    }
    modules = form_of(size("gpt-neox-tiny")).modules["layers"][0]["modules"]
    assert {path: module["class"].removeprefix(te.TE) for path, module in modules.items()} == {
        "self_attention": "MultiheadAttention",
        "mlp.linear_fc1": "LayerNormLinear",
        "mlp.linear_fc2": "Linear",
    }
