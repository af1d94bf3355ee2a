"""GLM-4.5, 4.5-Air and 4.6: RoPE on half of each head, DeepSeek V3's MoE and MTP."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.families.common.decoder import attention_of, moe_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.moe import read_deepseek_moe, write_deepseek_moe
from shared.families.common.tensor_table import DEEPSEEK_NAMES
from shared.families.family import TINY, Family


def read(fields: Fields) -> Architecture:
    """Biases of q, k and v only. Number of MTP layers: `num_nextn_predict_layers`; in transformers 5 `num_mtp_layers`."""
    decoder = read_decoder(fields, default_epsilon=1e-5, rotary_fraction=0.5)
    old, new = fields.optional("num_nextn_predict_layers", int), fields.optional("num_mtp_layers", int)
    if None not in (old, new) and old != new:
        raise UserError(
            f"config.json: num_nextn_predict_layers {old} contradicts num_mtp_layers {new}; keep the right one"
        )
    mtp = new if old is None else old
    moe, dense = read_deepseek_moe(
        fields,
        decoder,
        dense=1,
        grouped=True,
        score="sigmoid",
        normalized=fields.get("norm_topk_prob", bool, True),
        correction_bias=True,
    )
    return decoder.build(
        "glm4_moe",
        attention={
            "qk_norm": "head" if fields.get("use_qk_norm", bool, False) else None,
            "bias": fields.get("attention_bias", bool, False),
        },
        moe=moe,
        dense_layers=dense,
        mtp=1 if mtp is None else mtp,
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a, partial=True),
        **write_deepseek_moe(a),
        "attention_bias": attention_of(a).bias,
        "use_qk_norm": attention_of(a).qk_norm is not None,
        "norm_topk_prob": moe_of(a).normalized,
        "num_nextn_predict_layers": a.mtp.depth if a.mtp else 0,
    }


_GLM_4_5_AIR = {
    "num_hidden_layers": 46,
    "hidden_size": 4096,
    "intermediate_size": 10_944,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_552,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "n_shared_experts": 1,
    "attention_bias": True,
}

FAMILY = Family(
    name="glm4_moe",
    title="GLM-4.5, 4.5-Air, 4.6",
    hf_class="Glm4MoeForCausalLM",
    read=read,
    names=DEEPSEEK_NAMES,
    write=write,
    size_configs={
        "glm4-moe-tiny": {
            **_GLM_4_5_AIR,
            **TINY,
            "head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
        },
        "glm-4.5-air": _GLM_4_5_AIR,
        "glm-4.5": {
            **_GLM_4_5_AIR,
            "num_hidden_layers": 92,
            "hidden_size": 5120,
            "intermediate_size": 12_288,
            "first_k_dense_replace": 3,
            "n_routed_experts": 160,
            "moe_intermediate_size": 1536,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
        },
    },
)
