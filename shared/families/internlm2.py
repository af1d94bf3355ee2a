"""InternLM2 and 2.5: LLaMA with its own names; queries, keys and values fused in Megatron-Core's order."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, RopeScaling
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, written_fields
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    embedding="model.tok_embeddings",
    attention_norm="attention_norm",
    mlp_norm="ffn_norm",
    qkv=("attention.wqkv",),
    fused="groups",
    proj="attention.wo",
    fc1=("feed_forward.w1", "feed_forward.w3"),
    fc2="feed_forward.w2",
    head="output",
    pass_through=("attention.rotary_emb.inv_freq",),
)


def read(fields: Fields) -> Architecture:
    """`bias` is on the fused projection and on attention's output."""
    bias = fields.get("bias", bool, True)
    return nested(family="internlm2", qkv_bias=bias, attention_output_bias=bias, **common_fields(fields))


def write(a: Architecture) -> dict[str, Any]:
    return {**written_fields(a), "bias": a.qkv_bias}


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_INTERNLM2_7B = nested(
    family="internlm2",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14_336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=92_544,
    max_position_embeddings=32_768,
    norm_epsilon=1e-5,
    rope_theta=1_000_000.0,
    tied_embeddings=False,
)
_DYNAMIC = RopeScaling(kind="dynamic", factor=2.0)

FAMILY = Family(
    name="internlm2",
    title="InternLM2, 2.5",
    hf_class="InternLM2ForCausalLM",
    remote=True,
    read=read,
    table=table,
    write=write,
    sizes={
        "internlm2-tiny": tiny(_INTERNLM2_7B),
        "internlm2-tiny-bias": tiny(_INTERNLM2_7B, qkv_bias=True, attention_output_bias=True),
        "internlm2-1.8b": replace(
            _INTERNLM2_7B,
            num_layers=24,
            hidden_size=2048,
            ffn_hidden_size=8192,
            num_attention_heads=16,
            rope_scaling=_DYNAMIC,
        ),
        "internlm2-7b": _INTERNLM2_7B,
        "internlm2.5-7b": replace(_INTERNLM2_7B, rope_scaling=_DYNAMIC),
        "internlm2-20b": replace(
            _INTERNLM2_7B,
            num_layers=48,
            hidden_size=6144,
            ffn_hidden_size=16_384,
            num_attention_heads=48,
        ),
    },
)
