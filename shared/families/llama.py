"""LLaMA 1 to 3.3, CodeLLaMA, and whoever publishes in their form: Yi, DeepSeek v1 and Coder, Falcon 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.architecture.architecture import Architecture, RopeScaling
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, table, written_fields
from shared.families.common.fields import Fields, renamed
from shared.families.family import Family


def today(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the first uploads, from before transformers had the class."""
    return renamed(config, {"max_sequence_length": "max_position_embeddings"})


def read(fields: Fields) -> Architecture:
    """`attention_bias` is on q, k, v and o; `mlp_bias` on gate, up and down."""
    bias = fields.get("attention_bias", bool, False)
    return nested(
        family="llama",
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.get("mlp_bias", bool, False),
        **common_fields(fields),
    )


def write(a: Architecture) -> dict[str, Any]:
    return {**written_fields(a), "attention_bias": a.qkv_bias, "mlp_bias": a.mlp_bias}


_TINY = nested(
    family="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=512,
    max_position_embeddings=512,
    norm_epsilon=1e-5,
    rope_theta=10_000.0,
    tied_embeddings=False,
)
_LLAMA_3_1_8B = nested(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14_336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=128_256,
    max_position_embeddings=131_072,
    norm_epsilon=1e-5,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_length=8192),
    tied_embeddings=False,
)


def _small(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int) -> Architecture:
    return replace(
        _TINY,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        vocab_size=vocab,
        max_position_embeddings=2048,
        tied_embeddings=True,
    )


FAMILY = Family(
    name="llama",
    title="LLaMA 1, 2, 3.x, CodeLLaMA, Yi, DeepSeek v1, Falcon 3",
    hf_class="LlamaForCausalLM",
    other_classes=("LLaMAForCausalLM",),  # as the first models were published
    today=today,
    read=read,
    table=table,
    write=write,
    sizes={
        "tiny": _TINY,
        "llama-5m": _small(6, 256, 704, 4, 2, 4096),
        "llama-20m": _small(8, 384, 1024, 6, 2, 16_384),
        "llama-50m": _small(10, 576, 1536, 9, 3, 32_000),
        "llama-100m": _small(12, 768, 2048, 12, 4, 32_000),
        "llama-2-7b": replace(
            _LLAMA_3_1_8B,
            ffn_hidden_size=11_008,
            num_query_groups=32,
            vocab_size=32_000,
            max_position_embeddings=4096,
            rope_theta=10_000.0,
            rope_scaling=None,
        ),
        "llama-3.2-1b": replace(
            _LLAMA_3_1_8B,
            num_layers=16,
            hidden_size=2048,
            ffn_hidden_size=8192,
            head_dim=64,
            rope_scaling=RopeScaling(kind="llama3", factor=32.0, original_length=8192),
            tied_embeddings=True,
        ),
        "llama-3.1-8b": _LLAMA_3_1_8B,
    },
)
