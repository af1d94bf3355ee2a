"""GLM-10B, GLM-2B, GLM-large (Du et al., 2022): prefix LM with learned 2-D positions.

Published with remote code. Its model_type, glm, is also that of GLM-4 in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture, LearnedPositions, PrefixLM
from shared.errors import UserError
from shared.families.common.decoder import Spelling, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.common.token_ids import mask_token, token_ids
from shared.families.family import Family

_NAMES = Names(
    prefix="glm.",  # absent in the published files, which were saved from the base model
    embedding="glm.word_embeddings",
    positions="glm.transformer.position_embeddings",
    block_positions="glm.transformer.block_position_embeddings",
    layer="glm.transformer.layers.{layer}.",
    qkv=("attention.query_key_value",),
    proj="attention.dense",
    fc1=("mlp.dense_h_to_4h",),
    fc2="mlp.dense_4h_to_h",
    final_norm="glm.transformer.final_layernorm",
    pass_through=(),
)
_BLANKS = ("mask_token_id", "smask_token_id", "gmask_token_id")  # only the first, if the tokenizer has no other
_EPSILON = 1e-5  # hard-coded in the published class


def auxiliary_fields(directory: Path) -> Mapping[str, Any]:
    """Ids of start and mask tokens, which are in the tokenizer's files only."""
    known = token_ids(directory)
    names = {"sop_token_id": "<|startofpiece|>", "smask_token_id": "[sMASK]", "gmask_token_id": "[gMASK]"}
    names["mask_token_id"] = mask_token(directory)
    return {field: known[token] for field, token in names.items() if token in known}


_SPELLING = Spelling(
    layers="num_layers",
    ffn=None,
    groups=None,
    head_dim=None,
    positions="max_sequence_length",
    epsilon=None,
    activation=None,
    tied=None,
    attention_dropout="attention_dropout_prob",
    hidden_dropout="output_dropout_prob",
    embedding_dropout="embedding_dropout_prob",
)


def read(fields: Fields) -> Architecture:
    """Exact GELU, as in the published class; training used tanh GELU."""
    fields.expect("block_position_encoding", True, why="2-D positions are required")
    fields.expect("relative_encoding", False, why="only learned absolute positions are supported")
    fields.expect("output_predict", True, why="models without output layer are not supported")
    fields.expect("spell_length", why="prompt tuning is not supported")
    fields.expect("layernorm_epsilon", _EPSILON, why="the published class always uses 1e-5")
    fields.expect("tie_word_embeddings", True, why="embeddings are tied in this family")
    # Other heads, runtime, initialisation; attention_scale is undone before the softmax.
    fields.ignore("pool_token", "spell_func", "checkpoint_activations", "checkpoint_num_layers", "parallel_output")
    fields.ignore("use_scaled_init_for_output_weights", "attention_scale", "bad_words_ids", "bad_words_id")
    fields.ignore("max_memory_length")  # of returned hidden states
    start, blanks = fields.optional("sop_token_id", int), [fields.optional(name, int) for name in _BLANKS]
    if start is None or blanks[0] is None:
        raise UserError(
            "config.json has no sop_token_id and mask_token_id, and no tokenizer is in its directory to give the ids of "
            "<|startofpiece|> and [MASK]; put the published tokenizer's files there (added_tokens.json, vocab.json or "
            "vocab.txt, tokenizer_config.json)"
        )
    return read_decoder(fields, _SPELLING, rotary=False, default_epsilon=_EPSILON, tied=True, dropout=0.1).build(
        "glm10b",
        norm={"kind": "layernorm", "bias": True},
        mlp={"activation": "gelu", "bias": True},
        embedding={"positions": LearnedPositions()},
        attention={"bias": True, "output_bias": True},
        prefix=PrefixLM(
            start_token=start,
            blank_tokens=tuple(token for token in blanks if token is not None),
            earliest=True,
            position_streams=2,
        ),
    )


def write(a: Architecture) -> dict[str, Any]:
    assert a.prefix is not None
    return {
        **write_decoder(a, _SPELLING, rotary=False),
        "block_position_encoding": True,
        "output_predict": True,
        "sop_token_id": a.prefix.start_token,
        **dict(zip(_BLANKS, a.prefix.blank_tokens, strict=False)),
    }


_GLM_2B = {
    "num_layers": 36,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "vocab_size": 50_304,
    "max_sequence_length": 1024,
    "sop_token_id": 50_257,
    "mask_token_id": 50_260,
    "smask_token_id": 50_264,
    "gmask_token_id": 50_263,
}

FAMILY = Family(
    name="glm10b",
    title="GLM of 2021: GLM-10B, GLM-2B, GLM-large",
    hf_class="GLMForConditionalGeneration",
    other_classes=("GLMModel",),
    remote=True,
    explicit_positions=True,
    model_types=("glm",),
    matches=lambda config: "max_sequence_length" in config,
    auxiliary_fields=auxiliary_fields,
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "glm-10b-tiny": {
            **_GLM_2B,
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "vocab_size": 512,
            "max_sequence_length": 512,
            "attention_dropout_prob": 0.0,
            "output_dropout_prob": 0.0,
            "embedding_dropout_prob": 0.0,
            "sop_token_id": 7,
            "mask_token_id": 3,
            "smask_token_id": 5,
            "gmask_token_id": 4,
        },
        "glm-2b": _GLM_2B,
        "glm-10b": {**_GLM_2B, "num_layers": 48, "hidden_size": 4096, "num_attention_heads": 64},
    },
)
