"""Qwen3 MoE: Qwen3's attention, and experts without a shared one; layers may be dense by `mlp_only_layers`."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import Experts, nested
from shared.errors import UserError
from shared.families.common.decoder import common_fields, table, written_fields
from shared.families.common.fields import Fields
from shared.families.common.moe import dense_layers, expert_count, written_dense_layers
from shared.families.common.sliding_windows import (
    chunked_positions,
    optional_window_fields,
    written_optional_window_fields,
)
from shared.families.family import Family


def read(fields: Fields) -> Architecture:
    bias = fields.get("attention_bias", bool, False)
    common = chunked_positions(fields, common_fields(fields))
    fields.ignore("max_window_layers")
    fields.expect("qkv_bias", False, why="attention_bias decides it")
    fields.expect("use_qk_norm", True, why="this family has norms of queries and keys")
    fields.expect("shared_expert_intermediate_size", 0, why="this family has no shared experts")
    windows = optional_window_fields(fields, common["num_layers"], ())
    if windows.get("full_attention_layers"):
        raise UserError("config.json: layer_types: transformers gives all layers of this family the sliding window")
    experts = Experts(
        count=expert_count(fields, 128),
        top_k=fields.get("num_experts_per_tok", int, 8),
        ffn_hidden_size=fields.get("moe_intermediate_size", int, 768),
        normalized=fields.get("norm_topk_prob", bool, False),
        auxiliary_loss=fields.get("router_aux_loss_coef", float, 0.001),
        dense_layers=dense_layers(fields, common["num_layers"]),
    )
    return nested(
        family="qwen3_moe",
        qk_norm=True,
        qkv_bias=bias,
        attention_output_bias=bias,
        experts=experts,
        **common,
        **windows,
    )


def write(a: Architecture) -> dict[str, Any]:
    assert a.experts is not None
    return {
        **written_fields(a),
        "attention_bias": a.qkv_bias,
        **written_optional_window_fields(a),
        "num_experts": a.experts.count,
        "num_experts_per_tok": a.experts.top_k,
        "moe_intermediate_size": a.experts.ffn_hidden_size,
        "norm_topk_prob": a.experts.normalized,
        "router_aux_loss_coef": a.experts.auxiliary_loss,
        **written_dense_layers(a.experts),
    }


_QWEN3_30B_A3B = nested(
    family="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_attention_heads=32,
    num_query_groups=4,
    head_dim=128,
    vocab_size=151_936,
    max_position_embeddings=40_960,
    norm_epsilon=1e-6,
    rope_theta=1_000_000.0,
    qk_norm=True,
    experts=Experts(count=128, top_k=8, ffn_hidden_size=768, auxiliary_loss=0.001),
    tied_embeddings=False,
)
_TINY = replace(
    _QWEN3_30B_A3B,
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=32,
    vocab_size=512,
    max_position_embeddings=512,
    experts=Experts(count=8, top_k=3, ffn_hidden_size=32),
)

FAMILY = Family(
    name="qwen3_moe",
    title="Qwen3 MoE",
    hf_class="Qwen3MoeForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "qwen3-moe-tiny": _TINY,
        "qwen3-moe-tiny-mixed": replace(
            _TINY,
            num_layers=4,
            experts=Experts(count=4, top_k=2, ffn_hidden_size=32, normalized=False, dense_layers=(0, 2)),
        ),
        "qwen3-30b-a3b": _QWEN3_30B_A3B,
        "qwen3-235b-a22b": replace(
            _QWEN3_30B_A3B,
            num_layers=94,
            hidden_size=4096,
            ffn_hidden_size=12_288,
            num_attention_heads=64,
            experts=Experts(count=128, top_k=8, ffn_hidden_size=1536, auxiliary_loss=0.001),
        ),
    },
)
