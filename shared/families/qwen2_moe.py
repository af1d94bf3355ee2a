"""Qwen 1.5 and 2 MoE: Qwen2's attention; experts whose scores keep their size, beside a gated one for every token."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import Experts, nested
from shared.families.common.decoder import common_fields, table, written_fields
from shared.families.common.fields import Fields
from shared.families.common.moe import dense_layers, written_dense_layers
from shared.families.common.sliding_windows import optional_window_fields, written_optional_window_fields
from shared.families.family import Family


def read(fields: Fields) -> Architecture:
    bias = fields.get("qkv_bias", bool, True)
    common = common_fields(fields)
    layers, windowed = common["num_layers"], fields.get("max_window_layers", int, 28)
    # Of the first `max_window_layers` every other one has a window, and of those behind them none.
    full = (layer for layer in range(layers) if layer % 2 or layer >= windowed)
    windows = optional_window_fields(fields, layers, full)
    experts = Experts(
        count=fields.get("num_experts", int, 60),
        top_k=fields.get("num_experts_per_tok", int, 4),
        ffn_hidden_size=fields.get("moe_intermediate_size", int, 1408),
        normalized=fields.get("norm_topk_prob", bool, False),
        shared_ffn_hidden_size=fields.get("shared_expert_intermediate_size", int, 5632),
        shared_gate=True,
        auxiliary_loss=fields.get("router_aux_loss_coef", float, 0.001),
        dense_layers=dense_layers(fields, common["num_layers"]),
    )
    return nested(family="qwen2_moe", qkv_bias=bias, experts=experts, **common, **windows)


def write(a: Architecture) -> dict[str, Any]:
    assert a.experts is not None
    return {
        **written_fields(a),
        "qkv_bias": a.qkv_bias,
        **written_optional_window_fields(a),
        "num_experts": a.experts.count,
        "num_experts_per_tok": a.experts.top_k,
        "moe_intermediate_size": a.experts.ffn_hidden_size,
        "norm_topk_prob": a.experts.normalized,
        "shared_expert_intermediate_size": a.experts.shared_ffn_hidden_size,
        "router_aux_loss_coef": a.experts.auxiliary_loss,
        **written_dense_layers(a.experts),
    }


_QWEN_1_5_MOE = nested(
    family="qwen2_moe",
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=5632,
    num_attention_heads=16,
    num_query_groups=16,
    head_dim=128,
    vocab_size=151_936,
    max_position_embeddings=8192,
    norm_epsilon=1e-6,
    rope_theta=1_000_000.0,
    qkv_bias=True,
    experts=Experts(
        count=60,
        top_k=4,
        ffn_hidden_size=1408,
        normalized=False,
        shared_ffn_hidden_size=5632,
        shared_gate=True,
        auxiliary_loss=0.001,
    ),
    tied_embeddings=False,
)

FAMILY = Family(
    name="qwen2_moe",
    title="Qwen 1.5 and 2 MoE",
    hf_class="Qwen2MoeForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "qwen2-moe-tiny": replace(
            _QWEN_1_5_MOE,
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=160,
            num_attention_heads=4,
            num_query_groups=2,
            head_dim=16,
            vocab_size=512,
            max_position_embeddings=512,
            experts=Experts(
                count=6, top_k=2, ffn_hidden_size=32, normalized=False, shared_ffn_hidden_size=64, shared_gate=True
            ),
        ),
        "qwen1.5-moe-a2.7b": _QWEN_1_5_MOE,
    },
)
