"""Keys of layers and experts: stacked, a key per layer, a key per expert."""

from __future__ import annotations

import pytest

from shared.families import registry
from shared.mapping.account import account_targets
from shared.mapping.key_form import STACKED, KeyForm, key_of_norm
from shared.mapping.layout import Shape

BY_LAYER, BY_EXPERT = KeyForm(by_layer=True, by_expert=False), KeyForm(by_layer=True, by_expert=True)
FC1, ROUTER = "mlp.experts.experts.linear_fc1.weight", "mlp.router.weight"


@pytest.mark.parametrize(
    ("keys", "form"),
    [
        ([f"decoder.layers.{FC1}", "output_layer.weight"], STACKED),
        ([f"decoder.layers.0.{FC1}", "output_layer.weight"], BY_LAYER),
        ([f"decoder.layers.0.{ROUTER}", "decoder.layers.0.mlp.experts.experts.12.linear_fc2.weight"], BY_EXPERT),
        (["decoder.layers.0.mlp.linear_fc1.weight_w", "decoder.layers.0.mlp.linear_fc1.weight_v"], BY_EXPERT),
    ],
)
def test_the_form_is_read_from_the_keys(keys: list[str], form: KeyForm) -> None:
    assert KeyForm.of(keys) == form


@pytest.mark.parametrize(
    ("form", "key", "shape"),
    [
        (STACKED, f"decoder.layers.{FC1}", (2, 8, 64, 64)),
        (BY_LAYER, f"decoder.layers.1.{FC1}", (8, 64, 64)),
        (BY_EXPERT, "decoder.layers.1.mlp.experts.experts.7.linear_fc1.weight", (64, 64)),
    ],
)
def test_every_entry_has_a_key_of_the_form(form: KeyForm, key: str, shape: Shape) -> None:
    table = registry.table_of(registry.sizes()["qwen3-moe-tiny"])
    entries = list(form.table(table).entries())
    assert {entry.global_shape for entry in entries if entry.key == key} == {shape}
    assert len(entries) == len(list(table.entries()))
    assert KeyForm.of(entry.key for entry in entries) == form


@pytest.mark.parametrize("name", [name for name in registry.sizes() if "tiny" in name])
def test_a_directory_of_any_form_is_accounted_for(name: str) -> None:
    class Found:
        def __init__(self, shape: Shape) -> None:
            self.shape, self.place = shape, "here"

    table = registry.table_of(registry.sizes()[name])
    for form in (STACKED, BY_LAYER, BY_EXPERT):
        found = {entry.key: Found(entry.global_shape) for entry in form.table(table).entries()}
        account_targets(table, found, "here")


@pytest.mark.parametrize("layers", ["decoder.layers.", "decoder.layers.3.", "mtp.layers.0.transformer_layer."])
@pytest.mark.parametrize(
    ("own", "fused"),
    [
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        ("input_layernorm.bias", "self_attention.linear_qkv.layer_norm_bias"),
    ],
)
def test_a_norm_has_either_key(layers: str, own: str, fused: str) -> None:
    own, fused = layers + own, layers + fused
    assert key_of_norm(own, {fused}) == fused
    assert key_of_norm(fused, {own}) == own
    assert key_of_norm(own, {own, fused}) == own  # both: the other one stays unknown
    assert key_of_norm(own, {"decoder.layers.9.pre_mlp_layernorm.weight"}) == own
