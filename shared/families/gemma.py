"""Gemma 1 and CodeGemma: norms whose weight is stored less one, GeGLU, scaled and tied embeddings."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Activation, Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, table, written_fields
from shared.families.common.fields import Fields
from shared.families.family import Family, tiny

_TANH: dict[str, Activation] = {"gelu_pytorch_tanh": "geglu_tanh"}
# What the first releases called it; transformers computes the tanh form for either name.
_ACTIVATIONS = _TANH | {"gelu": "geglu_tanh"}


def read(fields: Fields) -> Architecture:
    """`hidden_activation` wins over `hidden_act`, which the first releases had wrong."""
    fields.expect("hidden_activation", *_ACTIVATIONS, why="this family has tanh GELU")
    fields.expect("use_bidirectional_attention", False, why="only causal attention is computed here")
    bias = fields.get("attention_bias", bool, False)
    common = common_fields(fields, activations=_ACTIVATIONS, default_activation="gelu_pytorch_tanh", tied=True)
    common["head_dim"] = fields.get("head_dim", int, 256)
    return nested(
        family="gemma",
        norm="rmsnorm_1p",
        embedding_multiplier=common["hidden_size"] ** 0.5,
        qkv_bias=bias,
        attention_output_bias=bias,
        **common,
    )


def write(a: Architecture) -> dict[str, Any]:
    return {**written_fields(a, activation="gelu_pytorch_tanh"), "attention_bias": a.qkv_bias}


_GEMMA_7B = nested(
    family="gemma",
    num_layers=28,
    hidden_size=3072,
    ffn_hidden_size=24_576,
    num_attention_heads=16,
    num_query_groups=16,
    head_dim=256,
    vocab_size=256_000,
    max_position_embeddings=8192,
    norm="rmsnorm_1p",
    norm_epsilon=1e-6,
    activation="geglu_tanh",
    embedding_multiplier=3072**0.5,
    tied_embeddings=True,
)

FAMILY = Family(
    name="gemma",
    title="Gemma 1, CodeGemma",
    hf_class="GemmaForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "gemma-tiny": tiny(_GEMMA_7B, num_query_groups=1, head_dim=32, embedding_multiplier=8.0),
        "gemma-2b": replace(
            _GEMMA_7B,
            num_layers=18,
            hidden_size=2048,
            ffn_hidden_size=16_384,
            num_attention_heads=8,
            num_query_groups=1,
            embedding_multiplier=2048**0.5,
        ),
        "gemma-7b": _GEMMA_7B,
    },
)
