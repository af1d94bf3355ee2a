"""Granite 3: LLaMA with embedding, residual, attention and logit multipliers."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import attention_of, mlp_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.family import TINY, Family


def read(fields: Fields) -> Architecture:
    """Softmax scale = `attention_multiplier`; logits are divided by `logits_scaling`."""
    bias = fields.get("attention_bias", bool, False)
    return read_decoder(fields, dropout=0.0).build(
        "granite",
        embedding={"multiplier": fields.get("embedding_multiplier", float, 1.0)},
        residual={"multiplier": fields.get("residual_multiplier", float, 1.0)},
        attention={"scale": fields.get("attention_multiplier", float, 1.0), "bias": bias, "output_bias": bias},
        mlp={"bias": fields.get("mlp_bias", bool, False)},
        head={"multiplier": 1.0 / fields.get("logits_scaling", float, 1.0)},
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a, head_dim=False),  # always hidden_size / num_attention_heads
        "embedding_multiplier": a.embedding.multiplier,
        "residual_multiplier": a.layers[0].residual.multiplier,
        "attention_multiplier": a.attention.scale,
        "logits_scaling": 1.0 / a.head.multiplier,
        "attention_bias": attention_of(a).bias,
        "mlp_bias": mlp_of(a).bias,
    }


_GRANITE_3_0_2B = {
    "num_hidden_layers": 40,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 49_155,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "attention_dropout": 0.1,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "logits_scaling": 8.0,
}

FAMILY = Family(
    name="granite",
    title="Granite 3",
    hf_class="GraniteForCausalLM",
    read=read,
    write=write,
    size_configs={
        "granite-tiny": {
            **_GRANITE_3_0_2B,
            **TINY,
            "attention_dropout": 0.0,
            "attention_multiplier": 0.125,
            "logits_scaling": 2.0,
        },
        "granite-3.0-2b": _GRANITE_3_0_2B,
        "granite-3.0-8b": {
            **_GRANITE_3_0_2B,
            "hidden_size": 4096,
            "intermediate_size": 12_800,
            "attention_multiplier": 0.0078125,
            "logits_scaling": 16.0,
        },
    },
)
