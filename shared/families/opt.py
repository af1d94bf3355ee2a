"""OPT and Galactica: learned positions with offset 2, ReLU or GELU.

OPT-350M: norm placement sum, no final norm, factorised embedding of half the hidden size.
"""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, LearnedPositions
from shared.families.common.decoder import GELU, Spelling, attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family
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

_SPELLING = Spelling(
    ffn="ffn_dim",
    groups=None,
    head_dim=None,
    epsilon=None,
    activation="activation_function",
    initializer_range="init_std",
)


def read(fields: Fields) -> Architecture:
    before = fields.get("do_layer_norm_before", bool, True)
    removed = fields.get("_remove_final_layer_norm", bool, False)
    fields.expect("learned_embeddings", True, why="this family has learned positions")
    fields.expect("scale_embeddings", False, why="transformers ignores it")
    fields.ignore("activation_dropout", "output_projection")  # read by no version of the class
    decoder = read_decoder(
        fields,
        _SPELLING,
        rotary=False,
        default_epsilon=1e-5,  # torch's default; config.json has no field
        activations=GELU,
        default_activation="relu",
        tied=True,
        dropout=0.0,
    )
    columns = fields.get("word_embed_proj_dim", int, decoder.hidden_size)
    bias = fields.get("enable_bias", bool, True)
    affine = fields.get("layer_norm_elementwise_affine", bool, True)
    return decoder.build(
        "opt",
        norm={"kind": "layernorm", "bias": True, "affine": affine},
        norm_placement="pre" if before else "sum",
        final_norm=before and not removed,
        residual={"dropout": fields.get("dropout", float, 0.1)},
        embedding={
            "factorised_size": None if columns == decoder.hidden_size else columns,
            "positions": LearnedPositions(offset=2),
        },
        attention={"bias": bias, "output_bias": bias},
        mlp={"bias": bias},
    )


def write(a: Architecture) -> dict[str, Any]:
    before = a.layers[0].norm_placement == "pre"
    return {
        **write_decoder(a, _SPELLING, rotary=False),
        "word_embed_proj_dim": a.table_size,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and a.head.norm is None,
        "enable_bias": attention_of(a).bias,
        "layer_norm_elementwise_affine": a.layers[0].norm.affine,
        "dropout": a.layers[0].residual.dropout,
    }


def table(a: Architecture) -> Table:
    """Norm tensors of a model with non-affine norms are pass-through; transformers ignores them."""
    if a.layers[0].norm.affine:
        return decoder_table(a, _NAMES)
    kinds = ("weight", "bias")
    layers = [_NAMES.layer + name for name in (_NAMES.attention_norm, _NAMES.mlp_norm)]
    without_weights = [PassThroughTensor(name=f"{name}.{kind}") for name in layers for kind in kinds]
    without_weights += [PassThroughTensor(name=f"{_NAMES.final_norm}.{kind}", axes=()) for kind in kinds]
    return decoder_table(a, _NAMES, without_weights)


_OPT_125M = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "vocab_size": 50_272,
    "max_position_embeddings": 2048,
}
_OPT_1_3B = {**_OPT_125M, "num_hidden_layers": 24, "hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32}
_GALACTICA_6_7B = {
    **_OPT_1_3B,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "ffn_dim": 16_384,
    "vocab_size": 50_000,
    "activation_function": "gelu",
    "attention_dropout": 0.1,
}
_OPT_TINY = {
    **_OPT_125M,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "ffn_dim": 160,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "dropout": 0.0,
}

FAMILY = Family(
    name="opt",
    title="OPT, Galactica",
    hf_class="OPTForCausalLM",
    read=read,
    own_table=table,
    write=write,
    size_configs={
        "opt-tiny": _OPT_TINY,
        "opt-350m-tiny": {**_OPT_TINY, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        "galactica-tiny": {
            **_OPT_TINY,
            "activation_function": "gelu",
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
        },
        "galactica-6.7b": _GALACTICA_6_7B,
        "galactica-30b": {
            **_GALACTICA_6_7B,
            "num_hidden_layers": 48,
            "hidden_size": 7168,
            "ffn_dim": 28_672,
            "num_attention_heads": 56,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
        },
        "opt-125m": _OPT_125M,
        "opt-350m": {
            **_OPT_1_3B,
            "hidden_size": 1024,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
            "ffn_dim": 4096,
            "num_attention_heads": 16,
        },
        "opt-1.3b": _OPT_1_3B,
    },
)
