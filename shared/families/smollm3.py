"""SmolLM3: LLaMA without rotary embedding in every fourth layer."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.version_1 import nested
from shared.errors import UserError
from shared.families.common.decoder import common_fields, full_attention_only, table, written_fields
from shared.families.common.fields import Fields
from shared.families.family import Family, tiny


def read(fields: Fields) -> Architecture:
    """`no_rope_layers` holds 1 where a layer has rotary embedding, and 0 where not."""
    bias = fields.get("attention_bias", bool, False)
    common = common_fields(fields, default_theta=2_000_000.0, tied=True)
    layers = common["num_layers"]
    full_attention_only(fields, layers)
    interval = fields.get("no_rope_layer_interval", int, 4)
    default = [int((index + 1) % interval != 0) for index in range(layers)]
    rotated = fields.get("no_rope_layers", list, default)[:layers]
    if len(rotated) < layers or set(rotated) - {0, 1}:
        raise UserError(f"config.json: no_rope_layers = {rotated!r} does not say 0 or 1 for {layers} layers")
    return nested(
        family="smollm3",
        layers_without_rope=tuple(index for index, rope in enumerate(rotated) if not rope),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.get("mlp_bias", bool, False),
        **common,
    )


def write(a: Architecture) -> dict[str, Any]:
    fields = written_fields(a)
    del fields["head_dim"]  # always hidden_size / num_attention_heads
    return {
        **fields,
        "no_rope_layers": [int(index not in a.layers_without_rope) for index in range(a.num_layers)],
        "use_sliding_window": False,
        "attention_bias": a.qkv_bias,
        "mlp_bias": a.mlp_bias,
    }


_SMOLLM3_3B = nested(
    family="smollm3",
    num_layers=36,
    hidden_size=2048,
    ffn_hidden_size=11_008,
    num_attention_heads=16,
    num_query_groups=4,
    head_dim=128,
    vocab_size=128_256,
    max_position_embeddings=65_536,
    norm_epsilon=1e-6,
    rope_theta=5_000_000.0,
    layers_without_rope=tuple(range(3, 36, 4)),
    tied_embeddings=True,
)

FAMILY = Family(
    name="smollm3",
    title="SmolLM3",
    hf_class="SmolLM3ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={"smollm3-tiny": tiny(_SMOLLM3_3B, layers_without_rope=(1,)), "smollm3-3b": _SMOLLM3_3B},
)
