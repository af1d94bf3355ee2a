"""StarCoder and SantaCoder: GPT-2 with one key/value head, fused behind the queries."""

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
    embedding="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h.{layer}.",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv=("attn.c_attn",),
    fused="groups",
    proj="attn.c_proj",
    fc1=("mlp.c_fc",),
    fc2="mlp.c_proj",
    final_norm="transformer.ln_f",
    pass_through=(),
)


def read(fields: Fields) -> Architecture:
    """Without `multi_query` each head's queries, keys and values follow each other: Megatron-Core's order too."""
    fields.expect("add_cross_attention", False, why="this is a decoder")
    # How scores are rounded below fp32, and how a server ran the models.
    fields.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    fields.ignore("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length")
    fields.ignore("pre_allocate_kv_cache", "validate_runner_input")
    common = gpt_fields(fields, dropout=0.1, default_activation="gelu_pytorch_tanh", tied=True)
    groups = 1 if fields.get("multi_query", bool, True) else common["num_attention_heads"]
    fields.expect("num_key_value_heads", groups, why="multi_query decides it")
    return nested(
        family="gpt_bigcode",
        positions="learned",
        num_query_groups=groups,
        qkv_bias=True,
        attention_output_bias=True,
        **common,
    )


def write(a: Architecture) -> dict[str, Any]:
    return {**written_gpt_fields(a), "multi_query": a.num_query_groups == 1}


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_STARCODER = nested(
    family="gpt_bigcode",
    num_layers=40,
    hidden_size=6144,
    ffn_hidden_size=24_576,
    num_attention_heads=48,
    num_query_groups=1,
    head_dim=128,
    vocab_size=49_152,
    max_position_embeddings=8192,
    norm="layernorm",
    norm_bias=True,
    norm_epsilon=1e-5,
    activation="gelu",
    positions="learned",
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    attention_dropout=0.1,
    hidden_dropout=0.1,
    embedding_dropout=0.1,
    tied_embeddings=True,
)
_TINY = tiny(_STARCODER, num_query_groups=1, attention_dropout=0.0, hidden_dropout=0.0, embedding_dropout=0.0)

FAMILY = Family(
    name="gpt_bigcode",
    title="StarCoder, SantaCoder",
    hf_class="GPTBigCodeForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "gpt-bigcode-tiny": _TINY,
        "gpt-bigcode-tiny-mha": replace(_TINY, num_query_groups=4),
        "starcoder-15b": _STARCODER,
    },
)
