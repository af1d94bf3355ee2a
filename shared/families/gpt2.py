"""GPT-2: learned positions, and linear layers held the other way round, as `[in, out]`."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.fields import Fields
from shared.families.common.gpt_fields import gpt_fields, written_gpt_fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    prefix="transformer.",
    embedding="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h.{layer}.",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv=("attn.c_attn",),
    proj="attn.c_proj",
    fc1=("mlp.c_fc",),
    fc2="mlp.c_proj",
    final_norm="transformer.ln_f",
    inputs_first=True,
    pass_through=("attn.bias", "attn.masked_bias"),
)


def read(fields: Fields) -> Architecture:
    fields.expect("add_cross_attention", False, why="this is a decoder")
    fields.ignore("reorder_and_upcast_attn")  # how scores are rounded below fp32
    common = gpt_fields(fields, dropout=0.1, default_activation="gelu_new", tied=True)
    return nested(
        family="gpt2",
        positions="learned",
        num_query_groups=common["num_attention_heads"],
        qkv_bias=True,
        attention_output_bias=True,
        attention_scale_by_layer=fields.get("scale_attn_by_inverse_layer_idx", bool, False),
        **common,
    )


def write(a: Architecture) -> dict[str, Any]:
    return {**written_gpt_fields(a), "scale_attn_by_inverse_layer_idx": a.attention_scale_by_layer}


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_GPT_2 = nested(
    family="gpt2",
    num_layers=12,
    hidden_size=768,
    ffn_hidden_size=3072,
    num_attention_heads=12,
    num_query_groups=12,
    head_dim=64,
    vocab_size=50_257,
    max_position_embeddings=1024,
    norm="layernorm",
    norm_bias=True,
    norm_epsilon=1e-5,
    activation="gelu_tanh",
    positions="learned",
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    attention_dropout=0.1,
    hidden_dropout=0.1,
    embedding_dropout=0.1,
    tied_embeddings=True,
)

_TINY = tiny(_GPT_2, num_query_groups=4, attention_dropout=0.0, hidden_dropout=0.0, embedding_dropout=0.0)

FAMILY = Family(
    name="gpt2",
    title="GPT-2, Cerebras-GPT, DistilGPT-2, Mistral's GPT-2s, BioMedLM",
    hf_class="GPT2LMHeadModel",
    read=read,
    table=table,
    write=write,
    sizes={
        "gpt2-tiny": _TINY,
        "gpt2-tiny-by-layer": replace(_TINY, attention_scale_by_layer=True),
        "gpt2": _GPT_2,
        "gpt2-xl": replace(
            _GPT_2,
            num_layers=48,
            hidden_size=1600,
            ffn_hidden_size=6400,
            num_attention_heads=25,
            num_query_groups=25,
        ),
    },
)
