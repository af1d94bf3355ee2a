"""Qwen 1.5, 2, 2.5 and QwQ, dense: biases on q, k and v only."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, table, written_fields
from shared.families.common.fields import Fields
from shared.families.common.sliding_windows import (
    chunked_positions,
    optional_window_fields,
    written_optional_window_fields,
)
from shared.families.family import Family, tiny


def read(fields: Fields) -> Architecture:
    common = chunked_positions(fields, common_fields(fields))
    windows = optional_window_fields(fields, common["num_layers"], range(fields.get("max_window_layers", int, 28)))
    return nested(family="qwen2", qkv_bias=True, **common, **windows)


def write(a: Architecture) -> dict[str, Any]:
    return {**written_fields(a), **written_optional_window_fields(a)}


_QWEN_2_5_0_5B = nested(
    family="qwen2",
    num_layers=24,
    hidden_size=896,
    ffn_hidden_size=4864,
    num_attention_heads=14,
    num_query_groups=2,
    head_dim=64,
    vocab_size=151_936,
    max_position_embeddings=32_768,
    norm_epsilon=1e-6,
    rope_theta=1_000_000.0,
    qkv_bias=True,
    tied_embeddings=True,
)

FAMILY = Family(
    name="qwen2",
    title="Qwen 1.5, 2, 2.5, QwQ (dense)",
    hf_class="Qwen2ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "qwen2-tiny": tiny(_QWEN_2_5_0_5B),
        "qwen2-tiny-window": tiny(_QWEN_2_5_0_5B, sliding_window=96, full_attention_layers=(0,)),
        "qwen2.5-0.5b": _QWEN_2_5_0_5B,
        "qwen2.5-7b": replace(
            _QWEN_2_5_0_5B,
            num_layers=28,
            hidden_size=3584,
            ffn_hidden_size=18_944,
            num_attention_heads=28,
            num_query_groups=4,
            head_dim=128,
            vocab_size=152_064,
            max_position_embeddings=131_072,
            tied_embeddings=False,
        ),
    },
)
