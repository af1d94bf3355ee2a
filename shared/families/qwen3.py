"""Qwen3, dense: no biases, RMSNorm on each head's queries and keys, head_dim given explicitly."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, RopeScaling
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, table, written_fields
from shared.families.common.fields import Fields
from shared.families.common.sliding_windows import optional_window_fields, written_optional_window_fields
from shared.families.family import Family

_DEFAULT_HEAD_DIM = 128  # not hidden_size / num_attention_heads


def read(fields: Fields) -> Architecture:
    bias = fields.get("attention_bias", bool, False)
    common = common_fields(fields) | {"head_dim": fields.get("head_dim", int, _DEFAULT_HEAD_DIM)}
    windows = optional_window_fields(fields, common["num_layers"], range(fields.get("max_window_layers", int, 28)))
    return nested(family="qwen3", qk_norm=True, qkv_bias=bias, attention_output_bias=bias, **common, **windows)


def write(a: Architecture) -> dict[str, Any]:
    return {**written_fields(a), "attention_bias": a.qkv_bias, **written_optional_window_fields(a)}


_QWEN3_8B = nested(
    family="qwen3",
    num_layers=36,
    hidden_size=4096,
    ffn_hidden_size=12_288,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=151_936,
    max_position_embeddings=40_960,
    norm_epsilon=1e-6,
    rope_theta=1_000_000.0,
    qk_norm=True,
    tied_embeddings=False,
)
_TINY = replace(
    _QWEN3_8B,
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=32,
    vocab_size=512,
    max_position_embeddings=512,
)

FAMILY = Family(
    name="qwen3",
    title="Qwen3 (dense)",
    hf_class="Qwen3ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "qwen3-tiny": _TINY,
        # As Qwen says to stretch its models.
        "qwen3-tiny-yarn": replace(_TINY, rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_length=128)),
        "qwen3-0.6b": replace(
            _QWEN3_8B,
            num_layers=28,
            hidden_size=1024,
            ffn_hidden_size=3072,
            num_attention_heads=16,
            tied_embeddings=True,
        ),
        "qwen3-8b": _QWEN3_8B,
    },
)
