"""GLM-130B: a text with a blank that sees itself, residuals of normed states (DeepNorm), and GeGLU with the gate last.

It is published as SwissArmyTransformer's shards only, which `shared.checkpoint.formats.swiss_army_transformer` joins.
The form read here is that program's: its names of the tensors of one whole model, beside a config.json of the fields that
its `model_config.json` has, with `model_type` glm130b and the ids of four tokens.
"""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.version_1 import Prefix, nested
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import PassThroughTensor, Table

_NAMES = Names(
    embedding="transformer.word_embeddings",
    layer="transformer.layers.{layer}.",
    qkv=("attention.query_key_value",),
    fused="groups",
    proj="attention.dense",
    fc1=("mlp.dense_h_to_4h",),
    gate_last=True,
    fc2="mlp.dense_4h_to_h",
    final_norm="transformer.final_layernorm",
    pass_through=("attention.rotary_emb.inv_freq",),
)
_BLANKS = ("mask_token_id", "smask_token_id", "gmask_token_id")  # by precedence; places count on behind the last


def read(fields: Fields) -> Architecture:
    """Positions and mask follow from the tokens `sop_token_id`, `mask_token_id`, `smask_token_id`, `gmask_token_id`.

    Residuals are multiplied by sqrt(2 * num_layers). Frequencies are rounded to fp16, as SwissArmyTransformer 0.2 does.
    """
    fields.expect("quantization_bit_width", 0, why="the weights are quantised; fetch the unquantised model")
    fields.expect("layernorm_order", "post", why="the residual is what the norm made")
    fields.expect("position_encoding_2d", False, why="places in the text are the only positions")
    fields.expect("no_glu", False, why="the MLP has a gate")
    fields.expect("tie_word_embeddings", True, why="the output layer is the embedding")
    fields.expect("model_class", "GLM130B", why="a class of SwissArmyTransformer with other arithmetic")
    fields.ignore("tokenizer_type", "model_parallel_size", "parallel_output")  # of how it is run
    layers, hidden, heads = (fields.get(name, int) for name in ("num_layers", "hidden_size", "num_attention_heads"))
    blanks = tuple(fields.get(name, int) for name in _BLANKS)
    return nested(
        family="glm130b",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=fields.get("inner_hidden_size", int),
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden // heads,
        vocab_size=fields.get("vocab_size", int),
        max_position_embeddings=fields.get("max_sequence_length", int),
        norm="layernorm",
        norm_bias=True,
        norm_epsilon=fields.get("layernorm_epsilon", float, 1e-5),
        residual="normed",
        input_multiplier=(2 * layers) ** 0.5,
        activation="geglu",
        mlp_bias=True,
        rotary_fp16=True,
        prefix=Prefix(
            start_token=fields.get("sop_token_id", int),
            blank_tokens=blanks,
            counted_tokens=blanks[-1:],
        ),
        qkv_bias=True,
        attention_output_bias=True,
        tied_embeddings=True,
    )


def write(a: Architecture) -> dict[str, Any]:
    assert a.prefix is not None
    return {
        "model_class": "GLM130B",
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "inner_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "vocab_size": a.vocab_size,
        "max_sequence_length": a.max_position_embeddings,
        "layernorm_epsilon": a.norm_epsilon,
        "layernorm_order": "post",
        "position_encoding_2d": False,
        "no_glu": False,
        "tie_word_embeddings": True,
        "sop_token_id": a.prefix.start_token,
        **dict(zip(_BLANKS, a.prefix.blank_tokens, strict=True)),
    }


def table(a: Architecture) -> Table:
    frequencies = PassThroughTensor(
        name="mixins.rotary-embedding.rotary_emb.inv_freq", axes=()
    )  # where that program saved it itself
    return decoder_table(a, _NAMES, (frequencies,))


_GLM_130B = nested(
    family="glm130b",
    num_layers=70,
    hidden_size=12_288,
    ffn_hidden_size=32_768,
    num_attention_heads=96,
    num_query_groups=96,
    head_dim=128,
    vocab_size=150_528,
    max_position_embeddings=2048,
    norm="layernorm",
    norm_bias=True,
    norm_epsilon=1e-5,
    residual="normed",
    input_multiplier=140**0.5,
    activation="geglu",
    mlp_bias=True,
    rotary_fp16=True,
    prefix=Prefix(start_token=150_004, blank_tokens=(150_000, 150_002, 150_001), counted_tokens=(150_001,)),
    qkv_bias=True,
    attention_output_bias=True,
    tied_embeddings=True,
)

FAMILY = Family(
    name="glm130b",
    title="GLM-130B, from SwissArmyTransformer's shards",
    hf_class="GLM130B",
    remote=True,
    read=read,
    table=table,
    write=write,
    sizes={
        "glm-130b-tiny": tiny(
            _GLM_130B,
            num_query_groups=4,
            input_multiplier=2.0,
            prefix=Prefix(start_token=7, blank_tokens=(3, 5, 4), counted_tokens=(4,)),
        ),
        "glm-130b": _GLM_130B,
    },
)
