"""GLM-4-0414: GLM-4-9B with a norm on both sides of attention and MLP."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, written_fields
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    fc1=("mlp.gate_up_proj",),
    post_attention_norm="post_self_attn_layernorm",
    post_mlp_norm="post_mlp_layernorm",
)


def read(fields: Fields) -> Architecture:
    """Biases are on q, k and v only."""
    common = common_fields(fields, default_epsilon=1.5625e-7, rotary_fraction=0.5)
    return nested(
        family="glm4",
        rotary_interleaved=True,
        qkv_bias=fields.get("attention_bias", bool, True),
        norm_placement="sandwich",
        **(common | {"head_dim": fields.get("head_dim", int, 128)}),
    )


def write(a: Architecture) -> dict[str, Any]:
    return {**written_fields(a, partial=True), "attention_bias": a.qkv_bias}


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_GLM_4_9B = nested(
    family="glm4",
    num_layers=40,
    hidden_size=4096,
    ffn_hidden_size=13_696,
    num_attention_heads=32,
    num_query_groups=2,
    head_dim=128,
    vocab_size=151_552,
    max_position_embeddings=32_768,
    norm_epsilon=1e-5,
    norm_placement="sandwich",
    rotary_dim=64,
    rotary_interleaved=True,
    qkv_bias=False,
    tied_embeddings=False,
)

FAMILY = Family(
    name="glm4",
    title="GLM-4-0414 (9B, 32B), GLM-Z1",
    hf_class="Glm4ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "glm4-tiny": tiny(_GLM_4_9B, rotary_dim=8),
        "glm-4-9b-0414": _GLM_4_9B,
        "glm-4-32b-0414": replace(
            _GLM_4_9B,
            num_layers=61,
            hidden_size=6144,
            ffn_hidden_size=23_040,
            num_attention_heads=48,
            num_query_groups=8,
        ),
    },
)
