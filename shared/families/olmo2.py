"""OLMo 2: norms behind attention and MLP only, and one over all queries, and over all keys."""

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

_NAMES = Names(post_attention_norm="post_attention_layernorm", post_mlp_norm="post_feedforward_layernorm")


def read(fields: Fields) -> Architecture:
    bias = fields.get("attention_bias", bool, False)
    return nested(
        family="olmo2",
        norm_placement="post",
        qk_norm=True,
        qk_norm_scope="projection",
        qkv_bias=bias,
        attention_output_bias=bias,
        **common_fields(fields, default_epsilon=1e-5),
    )


def write(a: Architecture) -> dict[str, Any]:
    fields = written_fields(a) | {"attention_bias": a.qkv_bias}
    del fields["head_dim"]  # always hidden_size / num_attention_heads
    return fields


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_OLMO_2_7B = nested(
    family="olmo2",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11_008,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=128,
    vocab_size=100_352,
    max_position_embeddings=4096,
    norm_epsilon=1e-6,
    norm_placement="post",
    rope_theta=500_000.0,
    qk_norm=True,
    qk_norm_scope="projection",
    tied_embeddings=False,
)

FAMILY = Family(
    name="olmo2",
    title="OLMo 2",
    hf_class="Olmo2ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "olmo2-tiny": tiny(_OLMO_2_7B),
        "olmo-2-7b": _OLMO_2_7B,
        "olmo-2-13b": replace(
            _OLMO_2_7B,
            num_layers=40,
            hidden_size=5120,
            ffn_hidden_size=13_824,
            num_attention_heads=40,
            num_query_groups=40,
        ),
    },
)
