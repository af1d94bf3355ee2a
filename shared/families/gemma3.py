"""Gemma 3, text: Gemma 2 with QK norm instead of soft caps, and separate RoPE in sliding-window layers."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, Rotary
from shared.errors import UserError
from shared.families.common.decoder import attention_of, local_rotary_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.sliding_windows import every, read_windows, windowed, write_rope_by_kind, write_windows
from shared.families.family import TINY, Family
from shared.families.gemma2 import ACTIVATIONS, NAMES, SPELLING


def read(fields: Fields) -> Architecture:
    """Every sixth layer has full attention, unless `layer_types` or `sliding_window_pattern` is given.

    Sliding-window layers: theta = `rope_local_base_freq`, no RoPE scaling.
    """
    fields.expect("use_bidirectional_attention", False, why="only causal attention is supported")
    fields.expect("attn_logit_softcapping", why="transformers ignores it")
    fields.ignore("cache_implementation", "_sliding_window_pattern")
    decoder = read_decoder(
        fields,
        SPELLING,
        default_theta=1_000_000.0,
        activations=ACTIVATIONS,
        default_activation="gelu_pytorch_tanh",
        default_head_dim=256,
        rope_by_kind=True,
        tied=True,
    )
    layers, pattern = decoder.num_layers, fields.get("sliding_window_pattern", int, 6)
    windows = read_windows(fields, layers, 4096, every(pattern, layers))
    old, new = fields.optional("rope_local_base_freq", float), decoder.local_theta
    if None not in (old, new) and old != new:
        raise UserError(f"config.json: rope_local_base_freq {old} contradicts rope_parameters, which say {new}")
    local = Rotary(theta=new or old or 10_000.0)
    bias = fields.get("attention_bias", bool, False)
    return decoder.build(
        "gemma3",
        norm={"zero_centered_gamma": True},
        norm_placement="sandwich",
        embedding={"multiplier": decoder.hidden_size**0.5},
        attention={
            "qk_norm": "head",
            "scale": fields.get("query_pre_attn_scalar", (int, float), 256) ** -0.5,
            "bias": bias,
            "output_bias": bias,
        },
        head={"softcap": fields.optional("final_logit_softcapping", float)},
        vary=windowed(windows, rotary=local),
    )


def write(a: Architecture) -> dict[str, Any]:
    assert a.attention.scale is not None
    return {
        **write_decoder(a, SPELLING),
        **write_rope_by_kind(a),
        "rope_local_base_freq": local.theta if (local := local_rotary_of(a)) else None,
        "query_pre_attn_scalar": round(a.attention.scale**-2),
        "final_logit_softcapping": a.head.softcap,
        **write_windows(a),
        "attention_bias": attention_of(a).bias,
    }


_GEMMA_3_4B_TEXT = {
    "num_hidden_layers": 34,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 1024,
}
_GEMMA_3_270M = {
    "num_hidden_layers": 18,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 262_144,
    "max_position_embeddings": 32_768,
    "sliding_window": 512,
}

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    title="Gemma 3 (270M, 1B, and the text models of 4B, 12B, 27B)",
    hf_class="Gemma3ForCausalLM",
    read=read,
    names=NAMES,
    write=write,
    size_configs={
        "gemma3-tiny": {
            **_GEMMA_3_4B_TEXT,
            **TINY,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 6.0,
            "sliding_window": 96,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "gemma-3-270m": _GEMMA_3_270M,
        "gemma-3-1b": {**_GEMMA_3_270M, "num_hidden_layers": 26, "hidden_size": 1152, "intermediate_size": 6912},
        "gemma-3-4b-text": _GEMMA_3_4B_TEXT,
        "gemma-3-12b-text": {
            **_GEMMA_3_4B_TEXT,
            "num_hidden_layers": 48,
            "hidden_size": 3840,
            "intermediate_size": 15_360,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
        "gemma-3-27b-text": {
            **_GEMMA_3_4B_TEXT,
            "num_hidden_layers": 62,
            "hidden_size": 5376,
            "intermediate_size": 21_504,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
        },
    },
)
