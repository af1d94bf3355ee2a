"""Qwen 1.5 and 2 MoE: Qwen2's attention; MoE with unnormalised scores and a gated shared expert."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.moe import read_dense_layers, read_qwen_moe, write_qwen_moe
from shared.families.common.sliding_windows import read_optional_windows, windowed, write_optional_windows
from shared.families.family import TINY, Family


def read(fields: Fields) -> Architecture:
    bias = fields.get("qkv_bias", bool, True)
    decoder = read_decoder(fields)
    layers, last = decoder.num_layers, fields.get("max_window_layers", int, 28)
    # Sliding window in every other layer of the first `max_window_layers`; full attention in the rest.
    full = (layer for layer in range(layers) if layer % 2 or layer >= last)
    return decoder.build(
        "qwen2_moe",
        attention={"bias": bias},
        vary=windowed(read_optional_windows(fields, layers, full)),
        moe=read_qwen_moe(
            fields,
            decoder,
            experts=fields.get("num_experts", int, 60),
            top_k=4,
            size=1408,
            shared=5632,
            normalized=False,
        ),
        dense_layers=read_dense_layers(fields, layers),
    )


def write(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), "qkv_bias": attention_of(a).bias, **write_optional_windows(a), **write_qwen_moe(a)}


_QWEN1_5_MOE_A2_7B = {
    "num_hidden_layers": 24,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "vocab_size": 151_936,
    "max_position_embeddings": 8192,
    "rope_theta": 1_000_000.0,
}

FAMILY = Family(
    name="qwen2_moe",
    title="Qwen 1.5 and 2 MoE",
    hf_class="Qwen2MoeForCausalLM",
    read=read,
    write=write,
    size_configs={
        "qwen2-moe-tiny": {
            **_QWEN1_5_MOE_A2_7B,
            **TINY,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "router_aux_loss_coef": 0.0,
        },
        "qwen1.5-moe-a2.7b": _QWEN1_5_MOE_A2_7B,
    },
)
