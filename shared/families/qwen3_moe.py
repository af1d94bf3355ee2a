"""Qwen3 MoE: Qwen3's attention, MoE without shared experts; dense layers by `mlp_only_layers`."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.families.common.decoder import attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.moe import expert_count, read_dense_layers, read_qwen_moe, write_qwen_moe
from shared.families.common.sliding_windows import limit_to_first_chunk, read_optional_windows, write_optional_windows
from shared.families.family import TINY, Family


def read(fields: Fields) -> Architecture:
    bias = fields.get("attention_bias", bool, False)
    decoder = limit_to_first_chunk(fields, read_decoder(fields))
    fields.ignore("max_window_layers")
    fields.expect("qkv_bias", False, why="set attention_bias instead")
    fields.expect("use_qk_norm", True, why="this family has QK norm")
    fields.expect("shared_expert_intermediate_size", 0, why="this family has no shared experts")
    windows = read_optional_windows(fields, decoder.num_layers, ())
    if len(set(windows)) > 1:
        raise UserError(
            "config.json: layer_types is not supported: transformers applies the sliding window to all layers of this family"
        )
    return decoder.build(
        "qwen3_moe",
        attention={"qk_norm": "head", "bias": bias, "output_bias": bias, "window": windows[0]},
        moe=read_qwen_moe(fields, decoder, experts=expert_count(fields, 128), top_k=8, size=768, normalized=False),
        dense_layers=read_dense_layers(fields, decoder.num_layers),
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a),
        "attention_bias": attention_of(a).bias,
        **write_optional_windows(a),
        **write_qwen_moe(a),
    }


_QWEN3_30B_A3B = {
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "norm_topk_prob": True,
}
_QWEN3_MOE_TINY = {
    **_QWEN3_30B_A3B,
    **TINY,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "router_aux_loss_coef": 0.0,
}

FAMILY = Family(
    name="qwen3_moe",
    title="Qwen3 MoE",
    hf_class="Qwen3MoeForCausalLM",
    read=read,
    write=write,
    size_configs={
        "qwen3-moe-tiny": _QWEN3_MOE_TINY,
        "qwen3-moe-tiny-mixed": {
            **_QWEN3_MOE_TINY,
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "mlp_only_layers": [0, 2],
        },
        "qwen3-30b-a3b": _QWEN3_30B_A3B,
        "qwen3-235b-a22b": {
            **_QWEN3_30B_A3B,
            "num_hidden_layers": 94,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_attention_heads": 64,
            "moe_intermediate_size": 1536,
        },
    },
)
