"""DeepSeek V3, V3.1, R1, Moonlight and Kimi K2: MLA; MoE with sigmoid scores and correction bias; MTP."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import moe_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.mla import read_mla, write_mla
from shared.families.common.moe import read_deepseek_moe, write_deepseek_moe
from shared.families.common.tensor_table import DEEPSEEK_NAMES
from shared.families.family import TINY, Family


def read(fields: Fields) -> Architecture:
    """Group score: sum of the two highest scores in the group."""
    decoder = read_decoder(fields)
    fields.expect("scoring_func", "sigmoid", why="supported: sigmoid")
    fields.expect("topk_method", "noaux_tc", why="supported: noaux_tc")
    moe, dense = read_deepseek_moe(
        fields,
        decoder,
        dense=3,
        grouped=True,
        score="sigmoid",
        normalized=fields.get("norm_topk_prob", bool, True),
        correction_bias=True,
    )
    mla = read_mla(fields, decoder.heads, decoder.rotary)
    mtp = fields.get("num_nextn_predict_layers", int, 0)
    return decoder.build("deepseek_v3", mixer=mla, moe=moe, dense_layers=dense, mtp=mtp)


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a),
        **write_mla(a),
        **write_deepseek_moe(a),
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": moe_of(a).normalized,
        "num_nextn_predict_layers": a.mtp.depth if a.mtp else 0,
    }


_MOONLIGHT_16B_A3B = {
    "num_hidden_layers": 27,
    "hidden_size": 2048,
    "intermediate_size": 11_264,
    "num_attention_heads": 16,
    "vocab_size": 163_840,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50_000.0,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.446,
    "aux_loss_alpha": 0.001,
}
_MOONLIGHT_TINY = {
    **_MOONLIGHT_16B_A3B,
    **TINY,
    "num_key_value_heads": 4,
    "rms_norm_eps": 0.1,  # differs from MLA's norm_epsilon
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 0,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "aux_loss_alpha": 0.0,
}
_KIMI_K2 = {
    **_MOONLIGHT_16B_A3B,
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "num_attention_heads": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "q_lora_rank": 1536,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.827,
}

FAMILY = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3", "kimi_k2"),  # Kimi K2 has DeepSeek V3's modelling code
    title="DeepSeek V3, V3.1, R1, Moonlight, Kimi K2",
    hf_class="DeepseekV3ForCausalLM",
    read=read,
    names=DEEPSEEK_NAMES,
    write=write,
    size_configs={
        "deepseek-v3-tiny": {
            **_MOONLIGHT_TINY,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10_000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "q_lora_rank": 20,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "n_group": 4,
            "topk_group": 2,
            "num_nextn_predict_layers": 1,
        },
        "moonlight-tiny": _MOONLIGHT_TINY,
        "deepseek-v3": {
            **_KIMI_K2,
            "num_attention_heads": 128,
            "vocab_size": 129_280,
            "max_position_embeddings": 163_840,
            "rope_theta": 10_000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "first_k_dense_replace": 3,
            "n_routed_experts": 256,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "aux_loss_alpha": 0.0,
            "num_nextn_predict_layers": 1,
        },
        "moonlight-16b-a3b": _MOONLIGHT_16B_A3B,
        "kimi-k2": _KIMI_K2,
    },
)
