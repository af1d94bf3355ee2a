"""Names of tensors in Megatron-LM's ranks, of any age, and the keys that torch_dist has for them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from shared.mapping.layout import Shape

HEAD = "output_layer.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12]\.(?:weight|bias))|(linear_fc[12]\.(?:weight|bias))(\d+))"
)
# Before Megatron-Core: language_model.encoder.layers.0.self_attention.query_key_value.weight
_OLD_ROOTS = (
    ("language_model.embedding.", "embedding."),
    ("language_model.encoder.", "decoder."),
    ("language_model.transformer.", "decoder."),
    ("language_model.output_layer.", "output_layer."),
    ("word_embeddings_for_head.", "output_layer."),
    ("word_embeddings.", "output_layer."),
)
_OLD_PARTS = (
    (r"^attention\.", "self_attention."),
    (r"^input_(?:layer)?norm\.", "self_attention.linear_qkv.layer_norm_"),
    (r"^post_attention_(?:layer)?norm\.", "mlp.linear_fc1.layer_norm_"),
    (r"^self_attention\.query_key_value\.", "self_attention.linear_qkv."),
    (r"^self_attention\.dense\.", "self_attention.linear_proj."),
    (r"^mlp\.dense_h_to_4h\.", "mlp.linear_fc1."),
    (r"^mlp\.dense_4h_to_h\.", "mlp.linear_fc2."),
)
# What Megatron-Core's own modules are named, where TransformerEngine's hold a norm as part of the layer behind it.
_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("input_layernorm.", "self_attention.in_proj.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which tensor of the model: a key without numbers, and the numbers."""

    key: str
    layer: int | None = None
    expert: int | None = None

    def moved(self, layers: int, experts: int) -> Place:
        """The same, counted from the first of the whole model."""
        layer = None if self.layer is None else self.layer + layers
        return replace(self, layer=layer, expert=None if self.expert is None else self.expert + experts)


def place_of(name: str) -> Place:
    """Where a rank's tensor belongs, by its name there; layers and experts are counted as the rank counts them."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    old = next((pair for pair in _OLD_ROOTS if name.startswith(pair[0])), None)
    if old:
        name = old[1] + name.removeprefix(old[0])
    name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")
    found = _LAYER.fullmatch(name)
    if found is None:
        return Place(key=name)
    layer, part = int(found[1]), found[2]
    if old:
        for pattern, new in _OLD_PARTS:
            part = re.sub(pattern, new, part)
    if expert := _EXPERT.fullmatch(part):
        number = int(expert[1] or expert[4])
        return Place(key=f"decoder.layers.mlp.experts.experts.{expert[2] or expert[3]}", layer=layer, expert=number)
    return Place(key=f"decoder.layers.{part}", layer=layer)


def spelt(place: Place, known: Collection[str]) -> tuple[str, Shape]:
    """torch_dist's key and the place in the stack, as the table of a model has them; unknown keys stay as they are."""
    numbers = tuple(number for number in (place.layer, place.expert) if number is not None)
    if place.layer is None:
        return place.key, ()
    part = place.key.removeprefix("decoder.layers.")
    for spelling in (part, *(new + part.removeprefix(old) for old, new in _NORMS if part.startswith(old))):
        for key, index in (
            (f"decoder.layers.{spelling}", numbers),
            (f"decoder.layers.{place.layer}.{spelling}", numbers[1:]),
        ):
            if key in known:
                return key, index
    return place.key, numbers
