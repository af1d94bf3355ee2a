"""Mistral 7B, Nemo, Small and Codestral: LLaMA's tensors, a sliding window in the first ones."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, table, written_fields
from shared.families.common.fields import Fields
from shared.families.family import Family, tiny


def read(fields: Fields) -> Architecture:
    """An absent `sliding_window` is transformers' default, 4096; null is none."""
    common = common_fields(fields)
    window = fields.nullable("sliding_window", int, 4096)
    fields.expect(
        "layer_types",
        [("full" if window is None else "sliding") + "_attention"] * common["num_layers"],
        why="all layers of this family are alike",
    )
    return nested(family="mistral", sliding_window=window, **common)


def write(a: Architecture) -> dict[str, Any]:
    return {**written_fields(a), "sliding_window": a.sliding_window}


_MISTRAL_7B = nested(
    family="mistral",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14_336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=32_000,
    max_position_embeddings=32_768,
    norm_epsilon=1e-5,
    rope_theta=10_000.0,
    sliding_window=4096,
    tied_embeddings=False,
)

FAMILY = Family(
    name="mistral",
    title="Mistral 7B, Nemo, Small, Codestral",
    hf_class="MistralForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "mistral-tiny": tiny(_MISTRAL_7B, sliding_window=96),
        "mistral-7b": _MISTRAL_7B,
        "mistral-nemo-12b": replace(
            _MISTRAL_7B,
            num_layers=40,
            hidden_size=5120,
            vocab_size=131_072,
            max_position_embeddings=131_072,
            rope_theta=1_000_000.0,
            sliding_window=None,
        ),
    },
)
