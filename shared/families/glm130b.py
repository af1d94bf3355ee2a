"""GLM-130B: prefix LM, residuals of normed states (DeepNorm), and GeGLU with the gate last.

It is published as SwissArmyTransformer's shards only, which `shared.checkpoint.formats.swiss_army_transformer` joins.
The form read here is that program's: its names of the tensors of one whole model, beside a config.json of the fields that
its `model_config.json` has, with `model_type` glm130b and the ids of four tokens.
"""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, PrefixLM, Rotary
from shared.families.common.decoder import Spelling, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family
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

_SPELLING = Spelling(
    layers="num_layers",
    ffn="inner_hidden_size",
    groups=None,
    head_dim=None,
    positions="max_sequence_length",
    epsilon="layernorm_epsilon",
    activation=None,
    tied=None,
    initializer_range=None,
    attention_dropout=None,
)


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
    decoder = read_decoder(fields, _SPELLING, rotary=False, default_epsilon=1e-5, tied=True)
    blanks = tuple(fields.get(name, int) for name in _BLANKS)
    start = fields.get("sop_token_id", int)
    return decoder.build(
        "glm130b",
        norm={"kind": "layernorm", "bias": True},
        residual={"kind": "normed", "input_multiplier": (2 * decoder.num_layers) ** 0.5},
        mlp={"activation": "geglu", "bias": True},
        attention={"rotary": Rotary(fp16_frequencies=True), "bias": True, "output_bias": True},
        prefix=PrefixLM(start_token=start, blank_tokens=blanks, counted_tokens=blanks[-1:]),
    )


def write(a: Architecture) -> dict[str, Any]:
    assert a.prefix is not None
    return {
        **write_decoder(a, _SPELLING, rotary=False),
        "model_class": "GLM130B",
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


_GLM_130B = {
    "num_layers": 70,
    "hidden_size": 12_288,
    "inner_hidden_size": 32_768,
    "num_attention_heads": 96,
    "vocab_size": 150_528,
    "max_sequence_length": 2048,
    "sop_token_id": 150_004,
    "mask_token_id": 150_000,
    "smask_token_id": 150_002,
    "gmask_token_id": 150_001,
}

FAMILY = Family(
    name="glm130b",
    title="GLM-130B, from SwissArmyTransformer's shards",
    hf_class="GLM130B",
    remote=True,
    read=read,
    own_table=table,
    write=write,
    size_configs={
        "glm-130b-tiny": {
            **_GLM_130B,
            "num_layers": 2,
            "hidden_size": 64,
            "inner_hidden_size": 160,
            "num_attention_heads": 4,
            "vocab_size": 512,
            "max_sequence_length": 512,
            "sop_token_id": 7,
            "mask_token_id": 3,
            "smask_token_id": 5,
            "gmask_token_id": 4,
        },
        "glm-130b": _GLM_130B,
    },
)
