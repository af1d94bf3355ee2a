"""How a torch_dist directory names layers and experts: stacked under one key, or a key each.

Forms that Megatron-Core's `sharded_state_dict` writes:

    stacked           decoder.layers.mlp.linear_fc1.weight [layers, ...]
                      decoder.layers.mlp.experts.experts.linear_fc1.weight [layers, experts, ...]
    a key per layer   decoder.layers.3.mlp.linear_fc1.weight
                      decoder.layers.3.mlp.experts.experts.linear_fc1.weight [experts, ...]
    a key per expert  decoder.layers.3.mlp.linear_fc1.weight_w (gate), ..._v (up)
                      decoder.layers.3.mlp.experts.experts.5.linear_fc1.weight_w, ..._v

The first is for alike layers. A list `moe_layer_freq`, `linear_attention_freq`, heterogeneous blocks and the metadata
`non_homogeneous_layers` ask for the second, though the layers may be alike; `singleton_local_shards` asks for the third.

A norm has a key of its own, or the key of TransformerEngine's module that fuses it with the linear layer behind it.
Megatron-Core's local spec has the second for MoE layers too, which TransformerEngine does not fuse, and the first for dense
layers with MLA.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from shared.mapping.rule import Rule, Table

_STACKED_LAYERS, _STACKED_EXPERTS = "decoder.layers.", ".experts.experts."
_LAYER = re.compile(r"decoder\.layers\.\d+\.")
_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
_SINGLETON = re.compile(r".*\.experts\.experts\.\d+\..*|.*\.linear_fc1\.(weight|bias)_[wv]")


@dataclass(frozen=True, kw_only=True)
class KeyForm:
    """Whether layers and experts have keys of their own."""

    by_layer: bool
    by_expert: bool

    @staticmethod
    def of(keys: Iterable[str]) -> KeyForm:
        """The form of a directory's keys."""
        listed = list(keys)
        return KeyForm(
            by_layer=any(_LAYER.match(key) for key in listed), by_expert=any(map(_SINGLETON.fullmatch, listed))
        )

    @property
    def metadata(self) -> dict[str, bool]:
        """The metadata with which Megatron-Core's `sharded_state_dict` has such keys."""
        flags = {"non_homogeneous_layers": self.by_layer, "singleton_local_shards": self.by_expert}
        return {name: True for name, asked in flags.items() if asked}

    def table(self, table: Table) -> Table:
        """The table with such keys. Layers that differ have keys of their own in every form."""
        return replace(table, rules=tuple(map(self._rule, table.rules)))

    def _rule(self, rule: Rule) -> Rule:
        key = rule.megatron
        if self.by_layer and "layer" in rule.stacked_axes:
            key = key.replace(_STACKED_LAYERS, f"{_STACKED_LAYERS}{{layer}}.", 1)
        if self.by_expert and "expert" in rule.stacked_axes:
            key = key.replace(_STACKED_EXPERTS, f"{_STACKED_EXPERTS}{{expert}}.", 1)
        return replace(rule, megatron=key)


STACKED = KeyForm(by_layer=False, by_expert=False)


def key_of_norm(key: str, found: Collection[str]) -> str:
    """The key that `found` has for the norm `key`; any other key, and a norm that is not found, as it is."""
    if key in found:
        return key
    spellings = (key.replace(one, other) for pair in _NORMS for one, other in (pair, pair[::-1]) if one in key)
    return next((each for each in spellings if each in found), key)
