"""gpt-oss: attention with sinks, in a window in every other layer; experts with biases and a limited, shifted gate."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Activation, Architecture, RopeScaling
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import Experts, nested
from shared.errors import UserError
from shared.families.common.decoder import common_fields, written_fields
from shared.families.common.fields import Fields
from shared.families.common.moe import expert_count
from shared.families.common.sliding_windows import every, window_fields, written_window_fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    router="mlp.router",
    experts_together=True,
    expert_fc1=("mlp.experts.gate_up_proj",),
    expert_fc2="mlp.experts.down_proj",
)
_ACTIVATIONS: dict[str, Activation] = {"silu": "quick_geglu"}  # what the files say, and what the class computes


def read(fields: Fields) -> Architecture:
    """A gate `g` and what it is multiplied with, `u`, are limited, then `g * sigmoid(1.702 g) * (u + 1)`."""
    if not fields.has("rope_scaling") and not fields.has("rope_parameters"):
        raise UserError("config.json: rope_scaling is missing; fetch config.json again")
    common = common_fields(
        fields, default_theta=150_000.0, default_epsilon=1e-5, activations=_ACTIVATIONS, default_activation="silu"
    )
    fields.expect("swiglu_alpha", 1.702, why="computed here: 1.702")
    bias, layers = fields.get("attention_bias", bool, True), common["num_layers"]
    experts = Experts(
        count=expert_count(fields, 128),
        top_k=fields.get("num_experts_per_tok", int, 4),
        ffn_hidden_size=common["ffn_hidden_size"],
        bias=True,
        auxiliary_loss=fields.get("router_aux_loss_coef", float, 0.001),
    )
    fields.expect("experts_per_token", experts.top_k, why="it is num_experts_per_tok, or absent")
    fields.ignore("initial_context_length")  # rope_scaling's original length, which is read
    return nested(
        family="gpt_oss",
        attention_sinks=True,
        qkv_bias=bias,
        attention_output_bias=bias,
        experts=experts,
        glu_limit=fields.get("swiglu_limit", float, 7.0),
        glu_offset=1.0,
        **window_fields(fields, layers, 128, every(2, layers)),
        **(common | {"head_dim": fields.get("head_dim", int, 64)}),
    )


def write(a: Architecture) -> dict[str, Any]:
    assert a.experts is not None
    return {
        **written_fields(a),
        **written_window_fields(a),
        "attention_bias": a.qkv_bias,
        "num_local_experts": a.experts.count,
        "num_experts_per_tok": a.experts.top_k,
        "router_aux_loss_coef": a.experts.auxiliary_loss,
        "swiglu_alpha": 1.702,
        "swiglu_limit": a.glu_limit,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_EXPERTS = Experts(count=128, top_k=4, ffn_hidden_size=2880, bias=True, auxiliary_loss=0.9)
_120B = nested(
    family="gpt_oss",
    num_layers=36,
    hidden_size=2880,
    ffn_hidden_size=2880,
    num_attention_heads=64,
    num_query_groups=8,
    head_dim=64,
    vocab_size=201_088,
    max_position_embeddings=131_072,
    norm_epsilon=1e-5,
    rope_theta=150_000.0,
    rope_scaling=RopeScaling(kind="yarn", factor=32.0, original_length=4096, truncate=False),
    attention_sinks=True,
    qkv_bias=True,
    attention_output_bias=True,
    sliding_window=128,
    full_attention_layers=tuple(range(1, 36, 2)),
    activation="quick_geglu",
    glu_limit=7.0,
    glu_offset=1.0,
    experts=_EXPERTS,
    tied_embeddings=False,
)

FAMILY = Family(
    name="gpt_oss",
    title="gpt-oss",
    hf_class="GptOssForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "gpt-oss-tiny": tiny(
            _120B,
            ffn_hidden_size=32,
            head_dim=32,
            rope_scaling=RopeScaling(kind="yarn", factor=8.0, original_length=64, truncate=False),
            sliding_window=96,
            full_attention_layers=(1,),
            glu_limit=1.5,  # so that tiny weights reach it
            experts=replace(_EXPERTS, count=8, top_k=3, ffn_hidden_size=32, auxiliary_loss=0.0),
        ),
        "gpt-oss-20b": replace(
            _120B, num_layers=24, full_attention_layers=tuple(range(1, 24, 2)), experts=replace(_EXPERTS, count=32)
        ),
        "gpt-oss-120b": _120B,
    },
)
