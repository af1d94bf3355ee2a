"""Gemma 2: Gemma with a norm on both sides, soft caps, and windows in every other layer."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Activation, Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, written_fields
from shared.families.common.fields import Fields
from shared.families.common.sliding_windows import every, window_fields, written_window_fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    mlp_norm="pre_feedforward_layernorm",
    post_attention_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)
ACTIVATIONS: dict[str, Activation] = {"gelu_pytorch_tanh": "geglu_tanh"}


def read(fields: Fields) -> Architecture:
    """Without `layer_types` the even layers, from 0, have the sliding window."""
    fields.expect("hidden_act", *ACTIVATIONS, why="this family has tanh GELU")
    fields.expect("use_bidirectional_attention", False, why="only causal attention is computed here")
    fields.ignore("cache_implementation")
    common = common_fields(
        fields,
        activations=ACTIVATIONS,
        activation_field="hidden_activation",
        default_activation="gelu_pytorch_tanh",
        tied=True,
    )
    bias = fields.get("attention_bias", bool, False)
    full = every(2, common["num_layers"])
    return nested(
        family="gemma2",
        norm="rmsnorm_1p",
        norm_placement="sandwich",
        embedding_multiplier=common["hidden_size"] ** 0.5,
        attention_scale=fields.get("query_pre_attn_scalar", (int, float), 256) ** -0.5,
        attention_softcap=fields.nullable("attn_logit_softcapping", float, 50.0),
        logit_softcap=fields.nullable("final_logit_softcapping", float, 30.0),
        **window_fields(fields, common["num_layers"], 4096, full),
        qkv_bias=bias,
        attention_output_bias=bias,
        **(common | {"head_dim": fields.get("head_dim", int, 256)}),
    )


def write(a: Architecture) -> dict[str, Any]:
    assert a.attention_scale is not None
    return {
        **written_fields(a, activation_field="hidden_activation", activation="gelu_pytorch_tanh"),
        "query_pre_attn_scalar": round(a.attention_scale**-2),
        "attn_logit_softcapping": a.attention_softcap,
        "final_logit_softcapping": a.logit_softcap,
        **written_window_fields(a),
        "attention_bias": a.qkv_bias,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_GEMMA_2_9B = nested(
    family="gemma2",
    num_layers=42,
    hidden_size=3584,
    ffn_hidden_size=14_336,
    num_attention_heads=16,
    num_query_groups=8,
    head_dim=256,
    vocab_size=256_000,
    max_position_embeddings=8192,
    norm="rmsnorm_1p",
    norm_epsilon=1e-6,
    norm_placement="sandwich",
    activation="geglu_tanh",
    embedding_multiplier=3584**0.5,
    attention_scale=256**-0.5,
    attention_softcap=50.0,
    logit_softcap=30.0,
    sliding_window=4096,
    full_attention_layers=tuple(range(1, 42, 2)),
    tied_embeddings=True,
)

FAMILY = Family(
    name="gemma2",
    title="Gemma 2",
    hf_class="Gemma2ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "gemma2-tiny": tiny(
            _GEMMA_2_9B,
            head_dim=32,
            embedding_multiplier=8.0,
            attention_scale=24**-0.5,
            attention_softcap=5.0,
            logit_softcap=6.0,
            sliding_window=96,
            full_attention_layers=(1,),
        ),
        "gemma-2-2b": replace(
            _GEMMA_2_9B,
            num_layers=26,
            hidden_size=2304,
            ffn_hidden_size=9216,
            num_attention_heads=8,
            num_query_groups=4,
            embedding_multiplier=2304**0.5,
            full_attention_layers=tuple(range(1, 26, 2)),
        ),
        "gemma-2-9b": _GEMMA_2_9B,
    },
)
