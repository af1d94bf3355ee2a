"""gpt-oss: attention sinks, sliding window in every other layer; MoE with biases and clamped GLU."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import MLP, Activation, Architecture, MoE
from shared.errors import UserError
from shared.families.common.decoder import attention_of, moe_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.moe import expert_count
from shared.families.common.sliding_windows import every, read_windows, windowed, write_windows
from shared.families.common.tensor_table import Names
from shared.families.family import TINY, Family

_NAMES = Names(
    router="mlp.router",
    stacked_experts=True,
    expert_fc1=("mlp.experts.gate_up_proj",),
    expert_fc2="mlp.experts.down_proj",
)
_ACTIVATIONS: dict[str, Activation] = {"silu": "quick_geglu"}  # config.json says silu; the class computes quick_geglu


def read(fields: Fields) -> Architecture:
    """MLP: clamp gate to <= limit, up to [-limit, limit]; `gate * sigmoid(1.702 gate) * (up + 1)`."""
    if not fields.has("rope_scaling") and not fields.has("rope_parameters"):
        raise UserError("config.json: rope_scaling is missing; fetch config.json again")
    decoder = read_decoder(
        fields, default_theta=150_000.0, default_epsilon=1e-5, activations=_ACTIVATIONS, default_head_dim=64
    )
    fields.expect("swiglu_alpha", 1.702, why="supported: 1.702")
    bias, layers = fields.get("attention_bias", bool, True), decoder.num_layers
    gate = {"clamp": fields.get("swiglu_limit", float, 7.0), "up_offset": 1.0}
    moe = MoE(
        experts=expert_count(fields, 128),
        top_k=fields.get("num_experts_per_tok", int, 4),
        expert=MLP(**decoder.mlp, **gate, bias=True),
        router_bias=True,
        auxiliary_loss=fields.get("router_aux_loss_coef", float, 0.001),
    )
    fields.expect("experts_per_token", moe.top_k, why="it must equal num_experts_per_tok, or be absent")
    fields.ignore("initial_context_length")  # equals rope_scaling.original_max_position_embeddings, which is read
    windows = read_windows(fields, layers, 128, every(2, layers))
    attention = {"sinks": True, "bias": bias, "output_bias": bias}
    return decoder.build("gpt_oss", attention=attention, moe=moe, vary=windowed(windows))


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a),
        **write_windows(a),
        "attention_bias": attention_of(a).bias,
        "num_local_experts": moe_of(a).experts,
        "num_experts_per_tok": moe_of(a).top_k,
        "router_aux_loss_coef": moe_of(a).auxiliary_loss,
        "swiglu_alpha": 1.702,
        "swiglu_limit": moe_of(a).expert.clamp,
    }


_GPT_OSS_120B = {
    "num_hidden_layers": 36,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 201_088,
    "max_position_embeddings": 131_072,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    "router_aux_loss_coef": 0.9,
}

FAMILY = Family(
    name="gpt_oss",
    title="gpt-oss",
    hf_class="GptOssForCausalLM",
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "gpt-oss-tiny": {
            **_GPT_OSS_120B,
            **TINY,
            "intermediate_size": 32,
            "head_dim": 32,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "truncate": False,
            },
            "sliding_window": 96,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "router_aux_loss_coef": 0.0,
            "swiglu_limit": 1.5,  # small enough to clamp with tiny weights
        },
        "gpt-oss-20b": {**_GPT_OSS_120B, "num_hidden_layers": 24, "num_local_experts": 32},
        "gpt-oss-120b": _GPT_OSS_120B,
    },
)
