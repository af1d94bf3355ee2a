"""BLOOM and BLOOMZ: ALiBi, a norm on the embedding, QKV in Megatron-Core order."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    prefix="transformer.",
    embedding="transformer.word_embeddings",
    embedding_norm="transformer.word_embeddings_layernorm",
    layer="transformer.h.{layer}.",
    qkv=("self_attention.query_key_value",),
    fused="groups",
    proj="self_attention.dense",
    fc1=("mlp.dense_h_to_4h",),
    fc2="mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
    pass_through=(),
)


def read(fields: Fields) -> Architecture:
    """Number of layers and of heads are spelt in two ways; `seq_length` is what the model was trained at."""
    fields.expect("apply_residual_connection_post_layernorm", False, why="the residual is the layer's input")
    fields.expect("slow_but_exact", False, why="sums are not split as they were in training")
    # Of the program that trained the models.
    fields.ignore("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "n_inner")
    fields.ignore("skip_bias_add", "skip_bias_add_qkv", "offset_alibi")

    def either(*names: str) -> int:
        return int(next((fields.get(name, int) for name in names if fields.has(name)), 0) or fields.get(names[0], int))

    hidden, heads = either("hidden_size", "n_embed"), either("n_head", "num_attention_heads")
    return nested(
        family="bloom",
        num_layers=either("n_layer", "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden // heads,
        vocab_size=fields.get("vocab_size", int),
        max_position_embeddings=fields.get("seq_length", int, 2048),
        norm="layernorm",
        norm_bias=True,
        norm_epsilon=fields.get("layer_norm_epsilon", float, 1e-5),
        embedding_norm=True,
        activation="gelu_tanh",
        mlp_bias=True,
        positions="alibi",
        qkv_bias=True,
        attention_output_bias=True,
        attention_dropout=fields.get("attention_dropout", float, 0.0),
        hidden_dropout=fields.get("hidden_dropout", float, 0.0),
        tied_embeddings=fields.get("tie_word_embeddings", bool, True),
        initializer_range=fields.get("initializer_range", float, 0.02),
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        "n_layer": a.num_layers,
        "hidden_size": a.hidden_size,
        "n_head": a.num_attention_heads,
        "vocab_size": a.vocab_size,
        "seq_length": a.max_position_embeddings,
        "layer_norm_epsilon": a.norm_epsilon,
        "attention_dropout": a.attention_dropout,
        "hidden_dropout": a.hidden_dropout,
        "tie_word_embeddings": a.tied_embeddings,
        "initializer_range": a.initializer_range,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_BLOOM = nested(
    family="bloom",
    num_layers=70,
    hidden_size=14_336,
    ffn_hidden_size=57_344,
    num_attention_heads=112,
    num_query_groups=112,
    head_dim=128,
    vocab_size=250_880,
    max_position_embeddings=2048,
    norm="layernorm",
    norm_bias=True,
    norm_epsilon=1e-5,
    embedding_norm=True,
    activation="gelu_tanh",
    positions="alibi",
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    tied_embeddings=True,
)
_TINY = tiny(_BLOOM, ffn_hidden_size=256, num_query_groups=4)

FAMILY = Family(
    name="bloom",
    title="BLOOM, BLOOMZ",
    hf_class="BloomForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "bloom-tiny": _TINY,
        # heads that are no power of two have two series of ALiBi slopes
        "bloom-tiny-6-heads": replace(
            _TINY, hidden_size=96, ffn_hidden_size=384, num_attention_heads=6, num_query_groups=6
        ),
        "bloom-560m": replace(
            _BLOOM,
            num_layers=24,
            hidden_size=1024,
            ffn_hidden_size=4096,
            num_attention_heads=16,
            num_query_groups=16,
            head_dim=64,
        ),
        "bloom-176b": _BLOOM,
    },
)
