"""Mixtral: Mistral with a mixture of experts in every layer; `w1` is the gate, `w3` up and `w2` down."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import Experts, nested
from shared.families.common.decoder import common_fields, written_fields
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family
from shared.mapping.rule import Table

_NAMES = Names(
    router="block_sparse_moe.gate",
    expert_fc1=("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
    expert_fc2="block_sparse_moe.experts.{expert}.w2",
)


def read(fields: Fields) -> Architecture:
    """Chosen experts' scores are divided by their sum; `sliding_window` is null in the released models."""
    fields.expect("router_jitter_noise", 0, 0.0, why="noise in training's routing is not computed; set it to 0.0")
    common = common_fields(fields, default_theta=1e6, default_epsilon=1e-5)
    experts = Experts(
        count=fields.get("num_local_experts", int, 8),
        top_k=fields.get("num_experts_per_tok", int, 2),
        ffn_hidden_size=common["ffn_hidden_size"],
        auxiliary_loss=fields.get("router_aux_loss_coef", float, 0.001),
    )
    window = fields.optional("sliding_window", int)
    return nested(family="mixtral", experts=experts, sliding_window=window, **common)


def write(a: Architecture) -> dict[str, Any]:
    assert a.experts is not None
    return {
        **written_fields(a),
        "sliding_window": a.sliding_window,
        "num_local_experts": a.experts.count,
        "num_experts_per_tok": a.experts.top_k,
        "router_aux_loss_coef": a.experts.auxiliary_loss,
        "router_jitter_noise": 0.0,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_MIXTRAL_8X7B = nested(
    family="mixtral",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14_336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=32_000,
    max_position_embeddings=32_768,
    norm_epsilon=1e-5,
    rope_theta=1_000_000.0,
    experts=Experts(count=8, top_k=2, ffn_hidden_size=14_336, auxiliary_loss=0.02),
    tied_embeddings=False,
)

FAMILY = Family(
    name="mixtral",
    title="Mixtral",
    hf_class="MixtralForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "mixtral-tiny": replace(
            _MIXTRAL_8X7B,
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=96,
            num_attention_heads=4,
            num_query_groups=2,
            head_dim=16,
            vocab_size=512,
            max_position_embeddings=512,
            experts=Experts(count=4, top_k=2, ffn_hidden_size=96),
        ),
        "mixtral-8x7b": _MIXTRAL_8X7B,
    },
)
