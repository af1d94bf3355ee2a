"""DeepSeek V2, V2.5 and V2-Lite: MLA; MoE with unnormalised softmax scores."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import moe_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.mla import read_mla, write_mla
from shared.families.common.moe import read_deepseek_moe, write_deepseek_moe
from shared.families.common.tensor_table import DEEPSEEK_NAMES
from shared.families.family import TINY, Family

_METHODS = {"greedy": False, "group_limited_greedy": True}  # topk_method -> group-limited routing


def read(fields: Fields) -> Architecture:
    """Group score: highest score in the group."""
    decoder = read_decoder(fields)
    fields.expect("mlp_bias", False, why="MLP biases are not supported with MoE")
    fields.expect("norm_topk_prob", False, why="transformers ignores true: scores stay unnormalised")
    fields.expect("scoring_func", "softmax", why="supported: softmax")
    fields.expect("topk_method", *_METHODS, why=f"supported: {', '.join(_METHODS)}")
    grouped = _METHODS[fields.get("topk_method", str, "greedy")]
    moe, dense = read_deepseek_moe(fields, decoder, dense=0, grouped=grouped, group_score_top=1, normalized=False)
    mla = read_mla(fields, decoder.heads, decoder.rotary)
    return decoder.build("deepseek_v2", mixer=mla, moe=moe, dense_layers=dense)


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a),
        **write_mla(a),
        **write_deepseek_moe(a),
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if moe_of(a).groups > 1 else "greedy",
    }


_DEEPSEEK_V2_LITE = {
    "num_hidden_layers": 27,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "num_attention_heads": 16,
    "vocab_size": 102_400,
    "max_position_embeddings": 163_840,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "n_shared_experts": 2,
    "aux_loss_alpha": 0.001,
}
_DEEPSEEK_V2_TINY = {
    **_DEEPSEEK_V2_LITE,
    **TINY,
    "num_key_value_heads": 4,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
    },
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "aux_loss_alpha": 0.0,
}

FAMILY = Family(
    name="deepseek_v2",
    title="DeepSeek V2, V2.5, V2-Lite",
    hf_class="DeepseekV2ForCausalLM",
    read=read,
    names=DEEPSEEK_NAMES,
    write=write,
    size_configs={
        "deepseek-v2-tiny": _DEEPSEEK_V2_TINY,
        "deepseek-v2-tiny-groups": {
            **_DEEPSEEK_V2_TINY,
            "rope_scaling": None,
            "q_lora_rank": 20,
            "first_k_dense_replace": 0,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "routed_scaling_factor": 4.0,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
        },
        "deepseek-v2-lite": _DEEPSEEK_V2_LITE,
        "deepseek-v2": {
            **_DEEPSEEK_V2_LITE,
            "num_hidden_layers": 60,
            "hidden_size": 5120,
            "intermediate_size": 12_288,
            "num_attention_heads": 128,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "q_lora_rank": 1536,
            "n_routed_experts": 160,
            "moe_intermediate_size": 1536,
            "routed_scaling_factor": 16.0,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
        },
    },
)
