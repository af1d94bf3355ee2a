"""Falcon 7B, 11B, 40B and 180B: parallel residual with one or two norms, fused QKV in Megatron-Core's order.

Falcon RW: sequential residual, biases, ALiBi.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shared.architecture.architecture import Alibi, Architecture, ResidualKind
from shared.families.common.decoder import GELU, Spelling, attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields, renamed
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family
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


def without_legacy_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Legacy names of `RefinedWebModel` (7B, RW) and `RefinedWeb` (40B: new decoder architecture only)."""
    names = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
    found = renamed(config, names | {"n_embed": "hidden_size"})
    if config.get("model_type") == "RefinedWeb":
        found.setdefault("new_decoder_architecture", True)
    return found


_SPELLING = Spelling(
    ffn="ffn_hidden_size", groups=None, head_dim=None, epsilon="layer_norm_epsilon", activation="activation"
)


def read(fields: Fields) -> Architecture:
    """`new_decoder_architecture` (40B, 180B, 11B): GQA and, by default, two norms."""
    fields.expect(
        "apply_residual_connection_post_layernorm", False, why="only residuals of the layer input are supported"
    )
    fields.ignore("parallel_attn", "multi_query", "num_ln_in_parallel_attn", "num_kv_heads", "ff_factor")
    decoder = read_decoder(
        fields,
        _SPELLING,
        ffn_ratio=4,
        default_positions=2048,
        default_epsilon=1e-5,
        activations=GELU,
        default_activation="gelu",
        tied=True,
    )
    new, heads = fields.get("new_decoder_architecture", bool, False), decoder.heads
    groups = 1
    if new or not fields.get("multi_query", bool, True):
        groups = fields.get("num_kv_heads", int, heads) if new else heads
    residual: ResidualKind = "parallel_shared"
    if new and fields.get("num_ln_in_parallel_attn", int, 2) == 2:
        residual = "parallel"
    elif not new and not fields.get("parallel_attn", bool, True):
        residual = "sequential"
    bias = fields.get("bias", bool, False)
    positions = {"rotary": None, "alibi": Alibi(rounded=True)} if fields.get("alibi", bool, False) else {}
    return decoder.build(
        "falcon",
        norm={"kind": "layernorm", "bias": True},
        residual={"kind": residual},
        attention={"groups": groups, "bias": bias, "output_bias": bias, **positions},
        mlp={"bias": bias},
    )


def write(a: Architecture) -> dict[str, Any]:
    """`new_decoder_architecture` false if possible: MQA or MHA, with one norm or a sequential residual."""
    residual, groups = a.layers[0].residual.kind, a.attention.groups
    old = residual != "parallel" and groups in (1, a.attention.heads)
    return {
        **write_decoder(a, _SPELLING),
        "num_kv_heads": groups,
        "new_decoder_architecture": not old,
        "num_ln_in_parallel_attn": None if old else 2 if residual == "parallel" else 1,
        "multi_query": groups == 1,
        "parallel_attn": residual != "sequential",
        "alibi": attention_of(a).alibi is not None,
        "bias": attention_of(a).bias,
        "hidden_dropout": 0.0,
    }


def table(a: Architecture) -> Table:
    two_norms = replace(_NAMES, attention_norm="ln_attn", mlp_norm="ln_mlp")
    return decoder_table(a, two_norms if a.layers[0].residual.kind == "parallel" else _NAMES)


_FALCON_7B = {"num_hidden_layers": 32, "hidden_size": 4544, "num_attention_heads": 71, "vocab_size": 65_024}
_FALCON_40B = {
    **_FALCON_7B,
    "num_hidden_layers": 60,
    "hidden_size": 8192,
    "num_attention_heads": 128,
    "num_kv_heads": 8,
    "new_decoder_architecture": True,
}
_FALCON_TINY = {
    **_FALCON_7B,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
_FALCON_TINY_NEW = {**_FALCON_TINY, "num_kv_heads": 2, "new_decoder_architecture": True}

FAMILY = Family(
    name="falcon",
    title="Falcon 7B, 11B, 40B, 180B, RW",
    hf_class="FalconForCausalLM",
    other_classes=("RWForCausalLM",),  # first uploads
    model_types=("falcon", "RefinedWebModel", "RefinedWeb"),
    without_legacy_names=without_legacy_names,
    read=read,
    own_table=table,
    write=write,
    size_configs={
        "falcon-tiny": _FALCON_TINY,
        "falcon-tiny-new": _FALCON_TINY_NEW,
        "falcon-tiny-11b": {
            **_FALCON_TINY_NEW,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
            "rope_theta": 5_000_042.0,
        },
        "falcon-tiny-rw": {**_FALCON_TINY, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        "falcon-rw-1b": {
            **_FALCON_7B,
            "num_hidden_layers": 24,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "multi_query": False,
            "parallel_attn": False,
            "vocab_size": 50_304,
            "alibi": True,
            "bias": True,
        },
        "falcon-7b": _FALCON_7B,
        "falcon-11b": {
            **_FALCON_40B,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_ln_in_parallel_attn": 1,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "rope_theta": 5_000_042.0,
        },
        "falcon-40b": _FALCON_40B,
        "falcon-180b": {**_FALCON_40B, "num_hidden_layers": 80, "hidden_size": 14_848, "num_attention_heads": 232},
    },
)
