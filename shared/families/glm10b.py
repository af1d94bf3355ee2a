"""The GLM of 2021 (Du et al., 2022): a text with a blank that sees itself, and two tables of learned positions.

It is published with modelling code of its own, whose model_type is that of transformers' GLM-4.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import Prefix, nested
from shared.errors import UserError
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.common.token_ids import mask_token, token_ids
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    prefix="glm.",  # published files were saved from the model without its task
    embedding="glm.word_embeddings",
    positions="glm.transformer.position_embeddings",
    filling_positions="glm.transformer.block_position_embeddings",
    layer="glm.transformer.layers.{layer}.",
    qkv=("attention.query_key_value",),
    proj="attention.dense",
    fc1=("mlp.dense_h_to_4h",),
    fc2="mlp.dense_4h_to_h",
    final_norm="glm.transformer.final_layernorm",
    pass_through=(),
)
_BLANKS = ("mask_token_id", "smask_token_id", "gmask_token_id")  # the first of them alone where that is the only kind
_EPSILON = 1e-5  # whatever the configuration says


def beside(directory: Path) -> Mapping[str, Any]:
    """Ids of the tokens that positions and mask follow from, which only the tokenizer's files know."""
    known = token_ids(directory)
    names = {"sop_token_id": "<|startofpiece|>", "smask_token_id": "[sMASK]", "gmask_token_id": "[gMASK]"}
    names["mask_token_id"] = mask_token(directory)
    return {field: known[token] for field, token in names.items() if token in known}


def read(fields: Fields) -> Architecture:
    """GELU is the exact one, as the published class has it; the program that trained the models took tanh's."""
    fields.expect("block_position_encoding", True, why="places in what fills a blank are positions of their own")
    fields.expect("relative_encoding", False, why="positions are learned")
    fields.expect("output_predict", True, why="the model answers with logits")
    fields.expect("spell_length", why="a tuned prompt is not computed here")
    fields.expect("layernorm_epsilon", _EPSILON, why="the published class takes 1e-5 whatever is configured")
    fields.expect("tie_word_embeddings", True, why="the output layer is the embedding")
    # Of the class's other heads, of how it is run and was started, and a scale that is taken back before the softmax.
    fields.ignore("pool_token", "spell_func", "checkpoint_activations", "checkpoint_num_layers", "parallel_output")
    fields.ignore("use_scaled_init_for_output_weights", "attention_scale", "bad_words_ids", "bad_words_id")
    fields.ignore("max_memory_length")  # of hidden states that the class hands back
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    start, blanks = fields.optional("sop_token_id", int), [fields.optional(name, int) for name in _BLANKS]
    if start is None or blanks[0] is None:
        raise UserError(
            "neither config.json (sop_token_id, mask_token_id) nor a tokenizer beside it says which tokens are "
            "<|startofpiece|> and [MASK], which positions follow from; put the published tokenizer's files there "
            "(added_tokens.json, vocab.json or vocab.txt, tokenizer_config.json)"
        )
    return nested(
        family="glm10b",
        num_layers=fields.get("num_layers", int),
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden // heads,
        vocab_size=fields.get("vocab_size", int),
        max_position_embeddings=fields.get("max_sequence_length", int),
        norm="layernorm",
        norm_bias=True,
        norm_epsilon=_EPSILON,
        activation="gelu",
        mlp_bias=True,
        positions="learned",
        position_streams=2,
        prefix=Prefix(
            start_token=start, blank_tokens=tuple(token for token in blanks if token is not None), earliest=True
        ),
        qkv_bias=True,
        attention_output_bias=True,
        attention_dropout=fields.get("attention_dropout_prob", float, 0.1),
        hidden_dropout=fields.get("output_dropout_prob", float, 0.1),
        embedding_dropout=fields.get("embedding_dropout_prob", float, 0.1),
        tied_embeddings=True,
        initializer_range=fields.get("initializer_range", float, 0.02),
    )


def write(a: Architecture) -> dict[str, Any]:
    assert a.prefix is not None
    return {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "vocab_size": a.vocab_size,
        "max_sequence_length": a.max_position_embeddings,
        "block_position_encoding": True,
        "output_predict": True,
        "attention_dropout_prob": a.attention_dropout,
        "output_dropout_prob": a.hidden_dropout,
        "embedding_dropout_prob": a.embedding_dropout,
        "initializer_range": a.initializer_range,
        "sop_token_id": a.prefix.start_token,
        **dict(zip(_BLANKS, a.prefix.blank_tokens, strict=False)),
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_GLM_10B = nested(
    family="glm10b",
    num_layers=48,
    hidden_size=4096,
    ffn_hidden_size=16_384,
    num_attention_heads=64,
    num_query_groups=64,
    head_dim=64,
    vocab_size=50_304,
    max_position_embeddings=1024,
    norm="layernorm",
    norm_bias=True,
    norm_epsilon=_EPSILON,
    activation="gelu",
    mlp_bias=True,
    positions="learned",
    position_streams=2,
    prefix=Prefix(start_token=50_257, blank_tokens=(50_260, 50_264, 50_263), earliest=True),
    qkv_bias=True,
    attention_output_bias=True,
    attention_dropout=0.1,
    hidden_dropout=0.1,
    embedding_dropout=0.1,
    tied_embeddings=True,
)

FAMILY = Family(
    name="glm10b",
    title="GLM of 2021: GLM-10B, GLM-2B, GLM-large",
    hf_class="GLMForConditionalGeneration",
    other_classes=("GLMModel",),
    remote=True,
    placed=True,
    model_types=("glm",),
    claims=lambda config: "max_sequence_length" in config,
    beside=beside,
    read=read,
    table=table,
    write=write,
    sizes={
        "glm-10b-tiny": tiny(
            _GLM_10B,
            ffn_hidden_size=256,
            num_query_groups=4,
            prefix=Prefix(start_token=7, blank_tokens=(3, 5, 4), earliest=True),
            attention_dropout=0.0,
            hidden_dropout=0.0,
            embedding_dropout=0.0,
        ),
        "glm-2b": replace(
            _GLM_10B,
            num_layers=36,
            hidden_size=2048,
            ffn_hidden_size=8192,
            num_attention_heads=32,
            num_query_groups=32,
        ),
        "glm-10b": _GLM_10B,
    },
)
