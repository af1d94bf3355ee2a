"""ChatGLM-6B: prefix LM, 2-D RoPE, DeepNorm with the norm's output as residual."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, PrefixLM, Rotary
from shared.families.common.decoder import Spelling, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import Family

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
# sqrt(2 * 28): the published class has 28 hard-coded, whatever num_layers says.
_INPUT_MULTIPLIER = 56**0.5

_SPELLING = Spelling(
    layers="num_layers",
    ffn="inner_hidden_size",
    groups=None,
    head_dim=None,
    positions="max_sequence_length",
    epsilon="layernorm_epsilon",
    activation=None,
    initializer_range=None,
    attention_dropout=None,
)


def read(fields: Fields) -> Architecture:
    """Positions and mask are computed from `bos_token_id`, `gmask_token_id` and `mask_token_id` in the ids.

    The first revision (vocabulary 150528, without gmask_token_id and mask_token_id) has other positions and is refused.
    inv_freq is rounded to fp16 at any precision, as in the published class.
    """
    fields.expect("quantization_config", why="the weights are quantised; fetch the unquantised model")
    fields.expect("quantization_bit", 0, why="the weights are quantised; fetch the unquantised model")
    fields.expect("pre_seq_len", why="P-tuning (prefix tuning) is not supported")
    fields.expect("position_encoding_2d", True, why="this family has 2-D positions")
    fields.ignore("prefix_projection")
    return read_decoder(fields, _SPELLING, rotary=False, default_epsilon=1e-5, tied=True).build(
        "chatglm",
        norm={"kind": "layernorm", "bias": True},
        residual={"kind": "normed", "input_multiplier": _INPUT_MULTIPLIER},
        mlp={"activation": "gelu_tanh", "bias": True},
        attention={"rotary": Rotary(fp16_frequencies=True), "bias": True, "output_bias": True},
        prefix=PrefixLM(
            start_token=fields.get("bos_token_id", int),
            blank_tokens=(fields.get("gmask_token_id", int), fields.get("mask_token_id", int)),
            position_streams=2,
        ),
    )


def write(a: Architecture) -> dict[str, Any]:
    assert a.prefix is not None
    gmask, mask = a.prefix.blank_tokens
    return {
        **write_decoder(a, _SPELLING, rotary=False),
        "position_encoding_2d": True,
        "bos_token_id": a.prefix.start_token,
        "gmask_token_id": gmask,
        "mask_token_id": mask,
    }


_CHATGLM_6B = {
    "num_layers": 28,
    "hidden_size": 4096,
    "inner_hidden_size": 16_384,
    "num_attention_heads": 32,
    "vocab_size": 130_528,
    "max_sequence_length": 2048,
    "bos_token_id": 130_004,
    "gmask_token_id": 130_001,
    "mask_token_id": 130_000,
}

FAMILY = Family(
    name="chatglm",
    title="ChatGLM-6B",
    hf_class="ChatGLMForConditionalGeneration",
    other_classes=("ChatGLMModel",),
    remote=True,
    matches=lambda config: "inner_hidden_size" in config,
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "chatglm-tiny": {
            **_CHATGLM_6B,
            "num_layers": 2,
            "hidden_size": 64,
            "inner_hidden_size": 160,
            "num_attention_heads": 4,
            "vocab_size": 512,
            "max_sequence_length": 512,
            "bos_token_id": 1,
            "gmask_token_id": 4,
            "mask_token_id": 3,
        },
        "chatglm-6b": _CHATGLM_6B,
    },
)
