"""Command-R, Command-R+ and Aya: attention and MLP side by side on one LayerNorm without bias, scaled logits."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, table, written_fields
from shared.families.common.fields import Fields
from shared.families.family import Family, tiny


def read(fields: Fields) -> Architecture:
    fields.ignore("model_max_length")  # the tokenizer's
    bias = fields.get("attention_bias", bool, False)
    normed = fields.get("use_qk_norm", bool, False)
    return nested(
        family="cohere",
        norm="layernorm",
        residual="parallel_shared",
        rotary_interleaved=True,
        logit_multiplier=fields.get("logit_scale", float, 0.0625),
        qk_norm=normed,
        qk_norm_scope="each_head" if normed else "head",
        qkv_bias=bias,
        attention_output_bias=bias,
        **common_fields(fields, default_theta=500_000.0, epsilon="layer_norm_eps", default_epsilon=1e-5, tied=True),
    )


def write(a: Architecture) -> dict[str, Any]:
    fields = written_fields(a, epsilon="layer_norm_eps")
    del fields["head_dim"]  # always hidden_size / num_attention_heads
    return {**fields, "logit_scale": a.logit_multiplier, "attention_bias": a.qkv_bias, "use_qk_norm": a.qk_norm}


_COMMAND_R = nested(
    family="cohere",
    num_layers=40,
    hidden_size=8192,
    ffn_hidden_size=22_528,
    num_attention_heads=64,
    num_query_groups=64,
    head_dim=128,
    vocab_size=256_000,
    max_position_embeddings=8192,
    norm="layernorm",
    norm_epsilon=1e-5,
    residual="parallel_shared",
    rope_theta=8_000_000.0,
    rotary_interleaved=True,
    logit_multiplier=0.0625,
    tied_embeddings=True,
)
_COMMAND_R_PLUS = replace(
    _COMMAND_R,
    num_layers=64,
    hidden_size=12_288,
    ffn_hidden_size=33_792,
    num_attention_heads=96,
    num_query_groups=8,
    rope_theta=75_000_000.0,
    logit_multiplier=0.8333333333333334,
    qk_norm=True,
    qk_norm_scope="each_head",
)

FAMILY = Family(
    name="cohere",
    title="Command-R, Command-R+, Aya",
    hf_class="CohereForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "cohere-tiny": tiny(_COMMAND_R, logit_multiplier=0.25),
        "cohere-tiny-qk-norm": tiny(_COMMAND_R_PLUS, logit_multiplier=0.25),
        "command-r": _COMMAND_R,
        "command-r-plus": _COMMAND_R_PLUS,
    },
)
