"""GLM-130B: prefix LM, DeepNorm with the norm's output as residual, GeGLU with fc1 `[up ; gate]`.

Published as SwissArmyTransformer shards only, merged by `shared.checkpoint.formats.swiss_army_transformer`. Tensor names are
SwissArmyTransformer's. config.json has the fields of its `model_config.json`, model_type glm130b and four token ids.
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
_BLANKS = (
    "mask_token_id",
    "smask_token_id",
    "gmask_token_id",
)  # by precedence; with the last, positions continue in the span (`PrefixLM.counted_tokens`)

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
    """Positions and mask are computed from `sop_token_id`, `mask_token_id`, `smask_token_id`, `gmask_token_id` in the ids.

    Residual multiplier: sqrt(2 * num_layers). inv_freq is rounded to fp16, as in SwissArmyTransformer 0.2.
    """
    fields.expect("quantization_bit_width", 0, why="the weights are quantised; fetch the unquantised model")
    fields.expect("layernorm_order", "post", why="only residuals of the norm's output are supported")
    fields.expect("position_encoding_2d", False, why="2-D positions are not supported for this family")
    fields.expect("no_glu", False, why="this family has a gated MLP")
    fields.expect("tie_word_embeddings", True, why="embeddings are tied in this family")
    fields.expect("model_class", "GLM130B", why="other SwissArmyTransformer classes are not supported")
    fields.ignore("tokenizer_type", "model_parallel_size", "parallel_output")  # runtime settings
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
    )  # in files saved by SwissArmyTransformer
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
