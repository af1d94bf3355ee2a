"""ChatGLM-6B: a prompt that sees itself, two streams of positions, and residuals of normed states (DeepNorm)."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.version_1 import Prefix, nested
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    embedding="transformer.word_embeddings",
    layer="transformer.layers.{layer}.",
    qkv=("attention.query_key_value",),
    fused="groups",
    proj="attention.dense",
    fc1=("mlp.dense_h_to_4h",),
    fc2="mlp.dense_4h_to_h",
    final_norm="transformer.final_layernorm",
    pass_through=("attention.rotary_emb.inv_freq",),
)
# sqrt(2 * 28): the published class counts 28 layers there, whatever num_layers says.
_INPUT_MULTIPLIER = 56**0.5


def read(fields: Fields) -> Architecture:
    """Positions and mask follow from the tokens `bos_token_id`, `gmask_token_id` and `mask_token_id` of each row.

    The first revision, whose vocabulary has 150528 tokens and whose configuration does not name the last two, computes
    other positions and is refused. Frequencies are rounded to fp16, as the published class does at any precision.
    """
    fields.expect("quantization_config", why="the weights are quantised; fetch the unquantised model")
    fields.expect("quantization_bit", 0, why="the weights are quantised; fetch the unquantised model")
    fields.expect("pre_seq_len", why="a prefix of tuned keys and values (P-tuning) is not computed here")
    fields.expect("position_encoding_2d", True, why="positions are two streams")
    fields.ignore("prefix_projection")
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    return nested(
        family="chatglm",
        num_layers=fields.get("num_layers", int),
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
        input_multiplier=_INPUT_MULTIPLIER,
        activation="gelu_tanh",
        mlp_bias=True,
        position_streams=2,
        rotary_fp16=True,
        prefix=Prefix(
            start_token=fields.get("bos_token_id", int),
            blank_tokens=(fields.get("gmask_token_id", int), fields.get("mask_token_id", int)),
        ),
        qkv_bias=True,
        attention_output_bias=True,
        tied_embeddings=fields.get("tie_word_embeddings", bool, True),
    )


def write(a: Architecture) -> dict[str, Any]:
    assert a.prefix is not None
    gmask, mask = a.prefix.blank_tokens
    return {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "inner_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "vocab_size": a.vocab_size,
        "max_sequence_length": a.max_position_embeddings,
        "layernorm_epsilon": a.norm_epsilon,
        "position_encoding_2d": True,
        "bos_token_id": a.prefix.start_token,
        "gmask_token_id": gmask,
        "mask_token_id": mask,
        "tie_word_embeddings": a.tied_embeddings,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_CHATGLM_6B = nested(
    family="chatglm",
    num_layers=28,
    hidden_size=4096,
    ffn_hidden_size=16_384,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=128,
    vocab_size=130_528,
    max_position_embeddings=2048,
    norm="layernorm",
    norm_bias=True,
    norm_epsilon=1e-5,
    residual="normed",
    input_multiplier=_INPUT_MULTIPLIER,
    activation="gelu_tanh",
    mlp_bias=True,
    position_streams=2,
    rotary_fp16=True,
    prefix=Prefix(start_token=130_004, blank_tokens=(130_001, 130_000)),
    qkv_bias=True,
    attention_output_bias=True,
    tied_embeddings=True,
)

FAMILY = Family(
    name="chatglm",
    title="ChatGLM-6B",
    hf_class="ChatGLMForConditionalGeneration",
    other_classes=("ChatGLMModel",),
    remote=True,
    claims=lambda config: "inner_hidden_size" in config,
    read=read,
    table=table,
    write=write,
    sizes={
        "chatglm-tiny": tiny(_CHATGLM_6B, num_query_groups=4, prefix=Prefix(start_token=1, blank_tokens=(4, 3))),
        "chatglm-6b": _CHATGLM_6B,
    },
)
