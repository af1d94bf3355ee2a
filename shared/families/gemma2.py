"""Gemma 2: Gemma with sandwich norms, soft caps, and a sliding window in every other layer."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Activation, Architecture
from shared.families.common.decoder import Spelling, attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.sliding_windows import every, read_windows, windowed, write_windows
from shared.families.common.tensor_table import Names
from shared.families.family import TINY, Family

NAMES = Names(
    mlp_norm="pre_feedforward_layernorm",
    post_attention_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)
ACTIVATIONS: dict[str, Activation] = {"gelu_pytorch_tanh": "geglu_tanh"}
SPELLING = Spelling(activation="hidden_activation")


def read(fields: Fields) -> Architecture:
    """Without `layer_types`, layers 0, 2, 4.. have the sliding window."""
    fields.expect("hidden_act", *ACTIVATIONS, why="this family has tanh GELU (gelu_pytorch_tanh)")
    fields.expect("use_bidirectional_attention", False, why="only causal attention is supported")
    fields.ignore("cache_implementation")
    decoder = read_decoder(
        fields,
        SPELLING,
        activations=ACTIVATIONS,
        default_activation="gelu_pytorch_tanh",
        default_head_dim=256,
        tied=True,
    )
    bias = fields.get("attention_bias", bool, False)
    return decoder.build(
        "gemma2",
        norm={"zero_centered_gamma": True},
        norm_placement="sandwich",
        embedding={"multiplier": decoder.hidden_size**0.5},
        attention={
            "scale": fields.get("query_pre_attn_scalar", (int, float), 256) ** -0.5,
            "softcap": fields.nullable("attn_logit_softcapping", float, 50.0),
            "bias": bias,
            "output_bias": bias,
        },
        head={"softcap": fields.nullable("final_logit_softcapping", float, 30.0)},
        vary=windowed(read_windows(fields, decoder.num_layers, 4096, every(2, decoder.num_layers))),
    )


def write(a: Architecture) -> dict[str, Any]:
    assert a.attention.scale is not None
    return {
        **write_decoder(a, SPELLING),
        "query_pre_attn_scalar": round(a.attention.scale**-2),
        "attn_logit_softcapping": attention_of(a).softcap,
        "final_logit_softcapping": a.head.softcap,
        **write_windows(a),
        "attention_bias": attention_of(a).bias,
    }


_GEMMA_2_2B = {
    "num_hidden_layers": 26,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
}

FAMILY = Family(
    name="gemma2",
    title="Gemma 2",
    hf_class="Gemma2ForCausalLM",
    read=read,
    names=NAMES,
    write=write,
    size_configs={
        "gemma2-tiny": {
            **_GEMMA_2_2B,
            **TINY,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 6.0,
            "sliding_window": 96,
        },
        "gemma-2-2b": _GEMMA_2_2B,
        "gemma-2-9b": {
            **_GEMMA_2_2B,
            "num_hidden_layers": 42,
            "hidden_size": 3584,
            "intermediate_size": 14_336,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
    },
)
