"""Gemma 3, text: Gemma 2 with norms on queries and keys for its soft caps, and its own rotation in windowed layers."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, RopeScaling
from shared.architecture.version_1 import nested
from shared.errors import UserError
from shared.families.common.decoder import common_fields, written_fields
from shared.families.common.fields import Fields, rope_fields_by_kind
from shared.families.common.sliding_windows import every, window_fields, written_window_fields
from shared.families.family import Family, tiny
from shared.families.gemma2 import ACTIVATIONS, table


def read(fields: Fields) -> Architecture:
    """Every sixth layer sees everything, unless `layer_types` or `sliding_window_pattern` says otherwise.

    Layers with a window have the base `rope_local_base_freq`, and are not stretched.
    """
    fields.expect("use_bidirectional_attention", False, why="only causal attention is computed here")
    fields.expect("attn_logit_softcapping", why="transformers computes none")
    fields.ignore("cache_implementation", "_sliding_window_pattern")
    common = common_fields(
        fields,
        default_theta=1_000_000.0,
        activations=ACTIVATIONS,
        activation_field="hidden_activation",
        default_activation="gelu_pytorch_tanh",
        rope_by_kind=True,
        tied=True,
    )
    windows = window_fields(
        fields, common["num_layers"], 4096, every(fields.get("sliding_window_pattern", int, 6), common["num_layers"])
    )
    old, new = fields.optional("rope_local_base_freq", float), common["window_rope_theta"]
    if None not in (old, new) and old != new:
        raise UserError(f"config.json: rope_local_base_freq {old} contradicts rope_parameters, which say {new}")
    theta = new or old or 10_000.0
    bias = fields.get("attention_bias", bool, False)
    return nested(
        family="gemma3",
        norm="rmsnorm_1p",
        norm_placement="sandwich",
        embedding_multiplier=common["hidden_size"] ** 0.5,
        attention_scale=fields.get("query_pre_attn_scalar", (int, float), 256) ** -0.5,
        logit_softcap=fields.optional("final_logit_softcapping", float),
        qk_norm=True,
        qkv_bias=bias,
        attention_output_bias=bias,
        **common
        | windows
        | {
            "head_dim": fields.get("head_dim", int, 256),
            "window_rope_theta": None if windows["sliding_window"] is None else theta,
        },
    )


def write(a: Architecture) -> dict[str, Any]:
    assert a.attention_scale is not None
    return {
        **written_fields(a, activation_field="hidden_activation", activation="gelu_pytorch_tanh"),
        **rope_fields_by_kind(a.rope_theta, a.rope_scaling, a.window_rope_theta),
        "rope_local_base_freq": a.window_rope_theta,
        "query_pre_attn_scalar": round(a.attention_scale**-2),
        "final_logit_softcapping": a.logit_softcap,
        **written_window_fields(a),
        "attention_bias": a.qkv_bias,
    }


def _size(layers: int, hidden: int, ffn: int, heads: int, groups: int, **further: Any) -> Architecture:
    return nested(
        **{
            "family": "gemma3",
            "num_layers": layers,
            "hidden_size": hidden,
            "ffn_hidden_size": ffn,
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "head_dim": 256,
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "norm": "rmsnorm_1p",
            "norm_epsilon": 1e-6,
            "norm_placement": "sandwich",
            "activation": "geglu_tanh",
            "embedding_multiplier": hidden**0.5,
            "attention_scale": 256**-0.5,
            "rope_theta": 1_000_000.0,
            "rope_scaling": RopeScaling(kind="linear", factor=8.0),
            "window_rope_theta": 10_000.0,
            "qk_norm": True,
            "sliding_window": 1024,
            "full_attention_layers": every(6, layers),
            "tied_embeddings": True,
            **further,
        }
    )


def _small(layers: int, hidden: int, ffn: int) -> Architecture:
    """Those without images."""
    return _size(
        layers,
        hidden,
        ffn,
        4,
        1,
        vocab_size=262_144,
        max_position_embeddings=32_768,
        rope_scaling=None,
        sliding_window=512,
    )


_GEMMA_3_4B = _size(34, 2560, 10_240, 8, 4)

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    title="Gemma 3 (270M, 1B, and the text models of 4B, 12B, 27B)",
    hf_class="Gemma3ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "gemma3-tiny": tiny(
            _GEMMA_3_4B,
            head_dim=32,
            embedding_multiplier=8.0,
            attention_scale=24**-0.5,
            logit_softcap=6.0,
            sliding_window=96,
            full_attention_layers=(1,),
        ),
        "gemma-3-270m": _small(18, 640, 2048),
        "gemma-3-1b": _small(26, 1152, 6912),
        "gemma-3-4b-text": _GEMMA_3_4B,
        "gemma-3-12b-text": _size(48, 3840, 15_360, 16, 8),
        "gemma-3-27b-text": _size(62, 5376, 21_504, 32, 16, head_dim=128, attention_scale=168**-0.5),
    },
)
