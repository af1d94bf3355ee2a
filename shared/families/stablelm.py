"""StableLM 3B, 2-1.6B and 2-12B: LayerNorm, a quarter of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, written_fields
from shared.families.common.fields import Fields, renamed
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(q_norm="self_attn.q_layernorm.norms.{query_head}", k_norm="self_attn.k_layernorm.norms.{key_head}")


def today(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of `stablelm_epoch`, the first uploads' own code."""
    names = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor", "num_heads": "num_attention_heads"}
    return renamed(config, names)


def read(fields: Fields) -> Architecture:
    """With `use_parallel_residual` attention and MLP share one norm."""
    fields.expect("hidden_dropout", 0, 0.0, why="train without dropout, or set it to 0.0")
    fields.expect("rotary_scaling_factor", 1, 1.0, why="angles are not scaled")
    parallel = fields.get("use_parallel_residual", bool, False)
    normed = fields.get("qk_layernorm", bool, False)
    return nested(
        family="stablelm",
        norm="layernorm",
        norm_bias=True,
        residual="parallel_shared" if parallel else "sequential",
        qkv_bias=fields.get("use_qkv_bias", bool, False),
        qk_norm=normed,
        qk_norm_scope="each_head" if normed else "head",
        **common_fields(fields, epsilon="layer_norm_eps", default_epsilon=1e-5, rotary_fraction=0.25),
    )


def write(a: Architecture) -> dict[str, Any]:
    fields = written_fields(a, epsilon="layer_norm_eps", partial=True)
    del fields["head_dim"]  # always hidden_size / num_attention_heads
    parallel = a.residual == "parallel_shared"
    return {**fields, "use_qkv_bias": a.qkv_bias, "use_parallel_residual": parallel, "qk_layernorm": a.qk_norm}


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_STABLELM_2_1_6B = nested(
    family="stablelm",
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=5632,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=64,
    vocab_size=100_352,
    max_position_embeddings=4096,
    norm="layernorm",
    norm_bias=True,
    norm_epsilon=1e-5,
    rotary_dim=16,
    qkv_bias=True,
    tied_embeddings=False,
)
_STABLELM_2_12B = replace(
    _STABLELM_2_1_6B,
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=13_824,
    num_query_groups=8,
    head_dim=160,
    rotary_dim=40,
    residual="parallel_shared",
    qkv_bias=False,
    qk_norm=True,
    qk_norm_scope="each_head",
)

FAMILY = Family(
    name="stablelm",
    title="StableLM 3B, StableLM 2 1.6B and 12B",
    hf_class="StableLmForCausalLM",
    other_classes=("StableLMEpochForCausalLM",),  # as the first models were published
    model_types=("stablelm", "stablelm_epoch"),
    today=today,
    read=read,
    table=table,
    write=write,
    sizes={
        "stablelm-tiny": tiny(_STABLELM_2_1_6B, rotary_dim=4),
        "stablelm-tiny-parallel": tiny(_STABLELM_2_1_6B, rotary_dim=4, residual="parallel_shared", qkv_bias=False),
        "stablelm-tiny-qk-norm": tiny(_STABLELM_2_12B, rotary_dim=4),
        "stablelm-2-1.6b": _STABLELM_2_1_6B,
        "stablelm-2-12b": _STABLELM_2_12B,
        "stablelm-3b-4e1t": replace(
            _STABLELM_2_1_6B,
            num_layers=32,
            hidden_size=2560,
            ffn_hidden_size=6912,
            head_dim=80,
            rotary_dim=20,
            vocab_size=50_304,
            qkv_bias=False,
        ),
    },
)
