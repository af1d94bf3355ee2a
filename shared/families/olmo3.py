"""OLMo 3: OLMo 2 with sliding windows in three of four layers; those that see everything are stretched."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, RopeScaling
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.errors import UserError
from shared.families.common.decoder import common_fields, written_fields
from shared.families.common.fields import Fields, rope_fields_by_kind
from shared.families.common.sliding_windows import every, window_fields, written_window_fields
from shared.families.family import Family, tiny
from shared.families.olmo2 import table

_THETA = 500_000.0


def read(fields: Fields) -> Architecture:
    """A base other than the default needs `rope_parameters`: transformers 5 takes `rope_theta` for full layers only."""
    common = common_fields(fields, default_theta=_THETA, default_epsilon=1e-5, rope_by_kind=True)
    windows = window_fields(fields, common["num_layers"], 4096, every(4, common["num_layers"]))
    theta, own = common["rope_theta"], common["window_rope_theta"]
    if own is None and theta != _THETA:
        raise UserError(
            f"config.json: rope_theta {theta} means another base of sliding layers to transformers 4 than to 5; "
            "give rope_parameters for full_attention and sliding_attention instead"
        )
    own = _THETA if own is None else own
    alike = windows["sliding_window"] is None or (own == theta and common["rope_scaling"] is None)
    bias = fields.get("attention_bias", bool, False)
    return nested(
        family="olmo3",
        norm_placement="post",
        qk_norm=True,
        qk_norm_scope="projection",
        qkv_bias=bias,
        attention_output_bias=bias,
        **common | windows | {"window_rope_theta": None if alike else own},
    )


def write(a: Architecture) -> dict[str, Any]:
    fields = {
        **written_fields(a),
        **rope_fields_by_kind(a.rope_theta, a.rope_scaling, a.window_rope_theta),
        **written_window_fields(a),
        "attention_bias": a.qkv_bias,
    }
    del fields["head_dim"]  # always hidden_size / num_attention_heads
    return fields


_OLMO_3_7B = nested(
    family="olmo3",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11_008,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=128,
    vocab_size=100_278,
    max_position_embeddings=65_536,
    norm_epsilon=1e-6,
    norm_placement="post",
    rope_theta=_THETA,
    rope_scaling=RopeScaling(kind="yarn", factor=8.0, original_length=8192, attention_factor=1.2079441541679836),
    window_rope_theta=_THETA,
    qk_norm=True,
    qk_norm_scope="projection",
    sliding_window=4096,
    full_attention_layers=every(4, 32),
    tied_embeddings=False,
)

FAMILY = Family(
    name="olmo3",
    title="OLMo 3",
    hf_class="Olmo3ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "olmo3-tiny": tiny(
            _OLMO_3_7B,
            rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_length=128),
            sliding_window=96,
            full_attention_layers=(1,),
        ),
        "olmo-3-7b": _OLMO_3_7B,
        "olmo-3-32b": replace(
            _OLMO_3_7B,
            num_layers=64,
            hidden_size=5120,
            ffn_hidden_size=27_648,
            num_attention_heads=40,
            num_query_groups=8,
            full_attention_layers=every(4, 64),
        ),
    },
)
