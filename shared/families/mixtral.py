"""Mixtral: Mistral with MoE in every layer; `w1` is gate, `w3` up, `w2` down."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import MLP, Architecture, MoE
from shared.families.common.decoder import attention_of, moe_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import TINY, Family

_NAMES = Names(
    router="block_sparse_moe.gate",
    class_router="mlp.gate",
    expert_fc1=("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
    expert_fc2="block_sparse_moe.experts.{expert}.w2",
)


def read(fields: Fields) -> Architecture:
    """Top-k scores are normalised; `sliding_window` is null in the released models."""
    fields.expect("router_jitter_noise", 0, 0.0, why="router jitter is not supported; set it to 0.0")
    decoder = read_decoder(fields, default_theta=1e6, default_epsilon=1e-5)
    moe = MoE(
        experts=fields.get("num_local_experts", int, 8),
        top_k=fields.get("num_experts_per_tok", int, 2),
        expert=MLP(**decoder.mlp),
        auxiliary_loss=fields.get("router_aux_loss_coef", float, 0.001),
    )
    return decoder.build("mixtral", moe=moe, attention={"window": fields.optional("sliding_window", int)})


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a),
        "sliding_window": attention_of(a).window,
        "num_local_experts": moe_of(a).experts,
        "num_experts_per_tok": moe_of(a).top_k,
        "router_aux_loss_coef": moe_of(a).auxiliary_loss,
        "router_jitter_noise": 0.0,
    }


_MIXTRAL_8X7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "max_position_embeddings": 32_768,
    "router_aux_loss_coef": 0.02,
}

FAMILY = Family(
    name="mixtral",
    title="Mixtral",
    hf_class="MixtralForCausalLM",
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "mixtral-tiny": {
            **_MIXTRAL_8X7B,
            **TINY,
            "intermediate_size": 96,
            "num_local_experts": 4,
            "router_aux_loss_coef": 0.0,
        },
        "mixtral-8x7b": _MIXTRAL_8X7B,
    },
)
