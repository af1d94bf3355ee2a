"""Tensor names in Megatron-LM's rank files, all versions, and their torch_dist keys."""

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
# Norm of the local spec -> norm of the TransformerEngine spec, fused into the next linear layer.
_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("input_layernorm.", "self_attention.in_proj.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor of the model: key without indices, layer index, expert index."""

    key: str
    layer: int | None = None
    expert: int | None = None

    def shifted(self, layers: int, experts: int) -> Place:
        """Global indices: the rank's indices plus the layers and experts of earlier ranks."""
        layer = None if self.layer is None else self.layer + layers
        return replace(self, layer=layer, expert=None if self.expert is None else self.expert + experts)


def place_of(name: str) -> Place:
    """Parse a rank file's tensor name; layer and expert indices are the rank's."""
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


def torch_dist_key(place: Place, known: Collection[str]) -> tuple[str, Shape]:
    """torch_dist key and index on the stacked axes; an unknown key is unchanged."""
    numbers = tuple(number for number in (place.layer, place.expert) if number is not None)
    if place.layer is None:
        return place.key, ()
    part = place.key.removeprefix("decoder.layers.")
    for name in (part, *(new + part.removeprefix(old) for old, new in _NORMS if part.startswith(old))):
        for key, index in (
            (f"decoder.layers.{name}", numbers),
            (f"decoder.layers.{place.layer}.{name}", numbers[1:]),
        ):
            if key in known:
                return key, index
    return place.key, numbers
