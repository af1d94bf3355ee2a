"""BLOOM and BLOOMZ: ALiBi, embedding norm, fused QKV in Megatron-Core's order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shared.architecture.architecture import Alibi, Architecture
from shared.families.common.decoder import Spelling, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import Family

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

_SPELLING = Spelling(
    layers="n_layer",
    ffn=None,
    heads="n_head",
    groups=None,
    head_dim=None,
    positions="seq_length",
    epsilon="layer_norm_epsilon",
    activation=None,
    hidden_dropout="hidden_dropout",
)


def read(fields: Fields) -> Architecture:
    """Number of layers and of heads have two spellings each; `seq_length` is the training length."""
    fields.expect(
        "apply_residual_connection_post_layernorm", False, why="only residuals of the layer input are supported"
    )
    fields.expect("slow_but_exact", False, why="slow_but_exact changes the order of sums and is not supported")
    # Fields of the training framework.
    fields.ignore("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "n_inner")
    fields.ignore("skip_bias_add", "skip_bias_add_qkv", "offset_alibi")

    def either(*names: str) -> str:
        return next((name for name in names if fields.has(name)), names[0])

    spelling = replace(
        _SPELLING,
        layers=either("n_layer", "num_hidden_layers"),
        hidden=either("hidden_size", "n_embed"),
        heads=either("n_head", "num_attention_heads"),
    )
    decoder = read_decoder(
        fields, spelling, rotary=False, default_positions=2048, default_epsilon=1e-5, tied=True, dropout=0.0
    )
    return decoder.build(
        "bloom",
        norm={"kind": "layernorm", "bias": True},
        embedding_norm=True,
        mlp={"activation": "gelu_tanh", "bias": True},
        attention={"alibi": Alibi(), "bias": True, "output_bias": True},
    )


def write(a: Architecture) -> dict[str, Any]:
    return write_decoder(a, _SPELLING, rotary=False)


_BLOOM_560M = {"n_layer": 24, "hidden_size": 1024, "n_head": 16, "vocab_size": 250_880}
_BLOOM_TINY = {**_BLOOM_560M, "n_layer": 2, "hidden_size": 64, "n_head": 4, "vocab_size": 512, "seq_length": 512}

FAMILY = Family(
    name="bloom",
    title="BLOOM, BLOOMZ",
    hf_class="BloomForCausalLM",
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "bloom-tiny": _BLOOM_TINY,
        # not a power of two: two series of ALiBi slopes
        "bloom-tiny-6-heads": {**_BLOOM_TINY, "hidden_size": 96, "n_head": 6},
        "bloom-560m": _BLOOM_560M,
        "bloom-176b": {**_BLOOM_560M, "n_layer": 70, "hidden_size": 14_336, "n_head": 112},
    },
)
