"""OPT and Galactica: learned positions whose table starts two rows early, ReLU or GELU.

The 350M model is of its own: norms of each sum, none behind the last, and a table of half the hidden size.
"""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import GELU, activation, gelu_name
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import PassThroughTensor, Table

_NAMES = Names(
    prefix="model.",
    embedding="model.decoder.embed_tokens",
    embedding_projection="model.decoder.project_in",
    output_projection="model.decoder.project_out",
    positions="model.decoder.embed_positions",
    layer="model.decoder.layers.{layer}.",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    post_attention_norm="self_attn_layer_norm",
    post_mlp_norm="final_layer_norm",
    proj="self_attn.out_proj",
    fc1=("fc1",),
    fc2="fc2",
    final_norm="model.decoder.final_layer_norm",
    pass_through=(),
)


def read(fields: Fields) -> Architecture:
    before = fields.get("do_layer_norm_before", bool, True)
    removed = fields.get("_remove_final_layer_norm", bool, False)
    fields.expect("learned_embeddings", True, why="positions are learned in this family")
    fields.expect("scale_embeddings", False, why="transformers computes none")
    fields.expect("layerdrop", 0, 0.0, why="layers are never dropped here")
    fields.ignore("activation_dropout", "output_projection")  # read by no version of the model
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    columns = fields.get("word_embed_proj_dim", int, hidden)
    bias = fields.get("enable_bias", bool, True)
    return nested(
        family="opt",
        num_layers=fields.get("num_hidden_layers", int),
        hidden_size=hidden,
        ffn_hidden_size=fields.get("ffn_dim", int),
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden // heads,
        vocab_size=fields.get("vocab_size", int),
        max_position_embeddings=fields.get("max_position_embeddings", int),
        norm="layernorm",
        norm_bias=True,
        norm_affine=fields.get("layer_norm_elementwise_affine", bool, True),
        norm_placement="pre" if before else "sum",
        final_norm=before and not removed,
        embedding_size=None if columns == hidden else columns,
        norm_epsilon=1e-5,  # torch's default: the family has no field for it
        activation=activation(fields, "activation_function", GELU, "relu"),
        mlp_bias=bias,
        positions="learned",
        learned_position_offset=2,
        qkv_bias=bias,
        attention_output_bias=bias,
        attention_dropout=fields.get("attention_dropout", float, 0.0),
        hidden_dropout=fields.get("dropout", float, 0.1),
        tied_embeddings=fields.get("tie_word_embeddings", bool, True),
        initializer_range=fields.get("init_std", float, 0.02),
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "word_embed_proj_dim": a.table_size,
        "do_layer_norm_before": a.norm_placement == "pre",
        "_remove_final_layer_norm": a.norm_placement == "pre" and not a.final_norm,
        "ffn_dim": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_position_embeddings,
        "activation_function": gelu_name(a),
        "enable_bias": a.qkv_bias,
        "layer_norm_elementwise_affine": a.norm_affine,
        "attention_dropout": a.attention_dropout,
        "dropout": a.hidden_dropout,
        "tie_word_embeddings": a.tied_embeddings,
        "init_std": a.initializer_range,
    }


def table(a: Architecture) -> Table:
    """Norms that files have though the model's have no weights are passed over, as transformers does."""
    if a.norm_affine:
        return decoder_table(a, _NAMES)
    kinds = ("weight", "bias")
    layers = [_NAMES.layer + name for name in (_NAMES.attention_norm, _NAMES.mlp_norm)]
    unread = [PassThroughTensor(name=f"{name}.{kind}") for name in layers for kind in kinds]
    unread += [PassThroughTensor(name=f"{_NAMES.final_norm}.{kind}", axes=()) for kind in kinds]
    return decoder_table(a, _NAMES, unread)


_OPT_1_3B = nested(
    family="opt",
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=64,
    vocab_size=50_272,
    max_position_embeddings=2048,
    norm="layernorm",
    norm_bias=True,
    norm_epsilon=1e-5,
    activation="relu",
    positions="learned",
    learned_position_offset=2,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    hidden_dropout=0.1,
    tied_embeddings=True,
)
_OPT_350M = replace(
    _OPT_1_3B,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    num_query_groups=16,
    norm_placement="sum",
    final_norm=False,
    embedding_size=512,
)
_GALACTICA = replace(
    _OPT_1_3B,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=16_384,
    head_dim=128,
    vocab_size=50_000,
    activation="gelu",
    attention_dropout=0.1,
)
_GALACTICA_30B = replace(
    _GALACTICA,
    num_layers=48,
    hidden_size=7168,
    ffn_hidden_size=28_672,
    num_attention_heads=56,
    num_query_groups=56,
    norm_affine=False,
    qkv_bias=False,
    attention_output_bias=False,
    mlp_bias=False,
)

FAMILY = Family(
    name="opt",
    title="OPT, Galactica",
    hf_class="OPTForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "opt-tiny": tiny(_OPT_1_3B, num_query_groups=4, hidden_dropout=0.0),
        "opt-350m-tiny": tiny(_OPT_350M, num_query_groups=4, embedding_size=32, hidden_dropout=0.0),
        "galactica-tiny": tiny(
            _GALACTICA_30B,
            num_query_groups=4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        "galactica-6.7b": _GALACTICA,
        "galactica-30b": _GALACTICA_30B,
        "opt-125m": replace(
            _OPT_1_3B,
            num_layers=12,
            hidden_size=768,
            ffn_hidden_size=3072,
            num_attention_heads=12,
            num_query_groups=12,
        ),
        "opt-350m": _OPT_350M,
        "opt-1.3b": _OPT_1_3B,
    },
)
