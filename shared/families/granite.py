"""Granite 3: LLaMA with multipliers of embeddings, residuals, attention and logits."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, table, written_fields
from shared.families.common.fields import Fields
from shared.families.family import Family, tiny


def read(fields: Fields) -> Architecture:
    """`attention_multiplier` takes the place of 1 / sqrt(head_dim); logits are divided by `logits_scaling`."""
    bias = fields.get("attention_bias", bool, False)
    dropout = fields.get("attention_dropout", float, 0.0)
    return nested(
        family="granite",
        embedding_multiplier=fields.get("embedding_multiplier", float, 1.0),
        residual_multiplier=fields.get("residual_multiplier", float, 1.0),
        attention_scale=fields.get("attention_multiplier", float, 1.0),
        logit_multiplier=1.0 / fields.get("logits_scaling", float, 1.0),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.get("mlp_bias", bool, False),
        attention_dropout=dropout,
        **common_fields(fields, dropout=True),
    )


def write(a: Architecture) -> dict[str, Any]:
    fields = written_fields(a)
    del fields["head_dim"]  # always hidden_size / num_attention_heads
    return {
        **fields,
        "embedding_multiplier": a.embedding_multiplier,
        "residual_multiplier": a.residual_multiplier,
        "attention_multiplier": a.attention_scale,
        "logits_scaling": 1.0 / a.logit_multiplier,
        "attention_bias": a.qkv_bias,
        "mlp_bias": a.mlp_bias,
    }


_GRANITE_3_8B = nested(
    family="granite",
    num_layers=40,
    hidden_size=4096,
    ffn_hidden_size=12_800,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=49_155,
    max_position_embeddings=4096,
    norm_epsilon=1e-5,
    rope_theta=10_000.0,
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    attention_scale=0.0078125,
    logit_multiplier=1.0 / 16.0,
    attention_dropout=0.1,
    tied_embeddings=True,
)

FAMILY = Family(
    name="granite",
    title="Granite 3",
    hf_class="GraniteForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "granite-tiny": tiny(_GRANITE_3_8B, attention_scale=0.125, logit_multiplier=0.5, attention_dropout=0.0),
        "granite-3.0-2b": replace(
            _GRANITE_3_8B,
            hidden_size=2048,
            ffn_hidden_size=8192,
            head_dim=64,
            attention_scale=0.015625,
            logit_multiplier=1.0 / 8.0,
        ),
        "granite-3.0-8b": _GRANITE_3_8B,
    },
)
