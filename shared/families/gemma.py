"""Gemma 1 and CodeGemma: zero-centred gamma, GeGLU, embedding multiplier, tied embeddings."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Activation, Architecture
from shared.families.common.decoder import attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.family import TINY, Family

_TANH: dict[str, Activation] = {"gelu_pytorch_tanh": "geglu_tanh"}
# The first releases say gelu; transformers computes tanh GELU for both names.
_ACTIVATIONS = _TANH | {"gelu": "geglu_tanh"}


def read(fields: Fields) -> Architecture:
    """`hidden_activation` overrides `hidden_act`, which is wrong in the first releases."""
    fields.expect("hidden_activation", *_ACTIVATIONS, why="this family has tanh GELU (gelu_pytorch_tanh)")
    fields.expect("use_bidirectional_attention", False, why="only causal attention is supported")
    bias = fields.get("attention_bias", bool, False)
    decoder = read_decoder(
        fields, activations=_ACTIVATIONS, default_activation="gelu_pytorch_tanh", default_head_dim=256, tied=True
    )
    return decoder.build(
        "gemma",
        norm={"zero_centered_gamma": True},
        embedding={"multiplier": decoder.hidden_size**0.5},
        attention={"bias": bias, "output_bias": bias},
    )


def write(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), "attention_bias": attention_of(a).bias}


_GEMMA_7B = {
    "num_hidden_layers": 28,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_attention_heads": 16,
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
}

FAMILY = Family(
    name="gemma",
    title="Gemma 1, CodeGemma",
    hf_class="GemmaForCausalLM",
    read=read,
    write=write,
    size_configs={
        "gemma-tiny": {**_GEMMA_7B, **TINY, "num_key_value_heads": 1, "head_dim": 32},
        "gemma-2b": {
            **_GEMMA_7B,
            "num_hidden_layers": 18,
            "hidden_size": 2048,
            "intermediate_size": 16_384,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
        },
        "gemma-7b": _GEMMA_7B,
    },
)
