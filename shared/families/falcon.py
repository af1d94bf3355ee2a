"""Falcon 7B, 11B, 40B and 180B: attention and MLP side by side on one norm or two, QKV in Megatron-Core order.

Falcon RW has them one after the other, biases, and ALiBi.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.architecture.architecture import Architecture, ResidualKind
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import GELU, activation, gelu_name
from shared.families.common.fields import Fields, renamed, rope_fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    embedding="transformer.word_embeddings",
    layer="transformer.h.{layer}.",
    qkv=("self_attention.query_key_value",),
    fused="groups",
    proj="self_attention.dense",
    fc1=("mlp.dense_h_to_4h",),
    fc2="mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
    pass_through=("self_attention.rotary_emb.inv_freq",),
)


def today(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of `RefinedWebModel` (7B, RW), and of `RefinedWeb` (40B), whose own code knew the new decoder only."""
    names = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
    found = renamed(config, names | {"n_embed": "hidden_size"})
    if config.get("model_type") == "RefinedWeb":
        found.setdefault("new_decoder_architecture", True)
    return found


def read(fields: Fields) -> Architecture:
    """The new decoder (40B on) has several key/value heads and, unless told otherwise, two norms."""
    fields.expect("apply_residual_connection_post_layernorm", False, why="the residual is the layer's input")
    for name in ("attention_dropout", "hidden_dropout"):
        fields.expect(name, 0, 0.0, why="train without dropout, or set it to 0.0")
    fields.ignore("parallel_attn", "multi_query", "num_ln_in_parallel_attn", "num_kv_heads", "ff_factor")
    alibi = fields.get("alibi", bool, False)
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    positions = fields.get("max_position_embeddings", int, 2048)
    theta, scaling = fields.rope(10_000.0, positions)
    new = fields.get("new_decoder_architecture", bool, False)
    groups = 1
    if new or not fields.get("multi_query", bool, True):
        groups = fields.get("num_kv_heads", int, heads) if new else heads
    residual: ResidualKind = "parallel_shared"
    if new and fields.get("num_ln_in_parallel_attn", int, 2) == 2:
        residual = "parallel"
    elif not new and not fields.get("parallel_attn", bool, True):
        residual = "sequential"
    bias = fields.get("bias", bool, False)
    return nested(
        family="falcon",
        num_layers=fields.get("num_hidden_layers", int),
        hidden_size=hidden,
        ffn_hidden_size=fields.get("ffn_hidden_size", int, 4 * hidden),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        vocab_size=fields.get("vocab_size", int),
        max_position_embeddings=positions,
        norm="layernorm",
        norm_bias=True,
        norm_epsilon=fields.get("layer_norm_epsilon", float, 1e-5),
        residual=residual,
        activation=activation(fields, "activation", GELU, "gelu"),
        mlp_bias=bias,
        positions="alibi" if alibi else "rope",
        alibi="rounded" if alibi else "exact",
        rope_theta=10_000.0 if alibi else theta,
        rope_scaling=scaling,
        qkv_bias=bias,
        attention_output_bias=bias,
        tied_embeddings=fields.get("tie_word_embeddings", bool, True),
        initializer_range=fields.get("initializer_range", float, 0.02),
    )


def write(a: Architecture) -> dict[str, Any]:
    """The old decoder where it can say it: one key/value head, or as many as queries, and one norm or a sequence."""
    old = a.residual != "parallel" and a.num_query_groups in (1, a.num_attention_heads)
    return {
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_kv_heads": a.num_query_groups,
        "new_decoder_architecture": not old,
        "num_ln_in_parallel_attn": None if old else 2 if a.residual == "parallel" else 1,
        "multi_query": a.num_query_groups == 1,
        "parallel_attn": a.residual != "sequential",
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_position_embeddings,
        "layer_norm_epsilon": a.norm_epsilon,
        "activation": gelu_name(a),
        "alibi": a.positions == "alibi",
        "bias": a.qkv_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tie_word_embeddings": a.tied_embeddings,
        "initializer_range": a.initializer_range,
        **rope_fields(a.rope_theta, a.rope_scaling),
    }


def table(a: Architecture) -> Table:
    two_norms = replace(_NAMES, attention_norm="ln_attn", mlp_norm="ln_mlp")
    return decoder_table(a, two_norms if a.residual == "parallel" else _NAMES)


_FALCON_7B = nested(
    family="falcon",
    num_layers=32,
    hidden_size=4544,
    ffn_hidden_size=18_176,
    num_attention_heads=71,
    num_query_groups=1,
    head_dim=64,
    vocab_size=65_024,
    max_position_embeddings=2048,
    norm="layernorm",
    norm_bias=True,
    norm_epsilon=1e-5,
    residual="parallel_shared",
    activation="gelu",
    tied_embeddings=True,
)
_FALCON_40B = replace(
    _FALCON_7B,
    num_layers=60,
    hidden_size=8192,
    ffn_hidden_size=32_768,
    num_attention_heads=128,
    num_query_groups=8,
    residual="parallel",
)
_FALCON_11B = replace(
    _FALCON_7B,
    num_layers=60,
    hidden_size=4096,
    ffn_hidden_size=16_384,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    max_position_embeddings=8192,
    rope_theta=5_000_042.0,
    tied_embeddings=False,
)
_FALCON_RW = replace(
    _FALCON_7B,
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=32,
    vocab_size=50_304,
    residual="sequential",
    positions="alibi",
    alibi="rounded",
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
)

FAMILY = Family(
    name="falcon",
    title="Falcon 7B, 11B, 40B, 180B, RW",
    hf_class="FalconForCausalLM",
    other_classes=("RWForCausalLM",),  # as the first models were published
    model_types=("falcon", "RefinedWebModel", "RefinedWeb"),
    today=today,
    read=read,
    table=table,
    write=write,
    sizes={
        "falcon-tiny": tiny(_FALCON_7B, num_query_groups=1),
        "falcon-tiny-new": tiny(_FALCON_40B),
        "falcon-tiny-11b": tiny(_FALCON_11B),
        "falcon-tiny-rw": tiny(_FALCON_RW, num_query_groups=4),
        "falcon-rw-1b": _FALCON_RW,
        "falcon-7b": _FALCON_7B,
        "falcon-11b": _FALCON_11B,
        "falcon-40b": _FALCON_40B,
        "falcon-180b": replace(
            _FALCON_40B,
            num_layers=80,
            hidden_size=14_848,
            ffn_hidden_size=59_392,
            num_attention_heads=232,
        ),
    },
)
