"""StarCoder2: LayerNorm, biases in all linear layers, MLP without gate, sliding window."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import GELU, Spelling, attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import TINY, Family

_NAMES = Names(fc1=("mlp.c_fc",), fc2="mlp.c_proj")
_SPELLING = Spelling(epsilon="norm_epsilon", hidden_dropout="residual_dropout", embedding_dropout="embedding_dropout")


def read(fields: Fields) -> Architecture:
    """`use_bias`: of every linear layer; norms always have biases."""
    bias = fields.get("use_bias", bool, True)
    fields.expect("norm_type", "layer_norm", why="this family has LayerNorm")
    fields.expect("mlp_type", "default", why="this family's MLP has no gate")
    fields.expect("scale_attn_weights", True, why="the softmax scale must be 1 / sqrt(head_dim)")
    # gpt_bigcode fields left in the 7B's config.json; transformers does not read them.
    fields.ignore("activation_function", "layer_norm_epsilon")
    fields.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    decoder = read_decoder(
        fields,
        _SPELLING,
        default_epsilon=1e-5,
        activations=GELU,
        default_activation="gelu_pytorch_tanh",
        tied=True,
        initializer_range=0.018042,
        dropout=0.0,
    )
    window = fields.optional("sliding_window", int)
    return decoder.build(
        "starcoder2",
        norm={"kind": "layernorm", "bias": True},
        attention={"window": window, "bias": bias, "output_bias": bias},
        mlp={"bias": bias},
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a, _SPELLING, head_dim=False),  # always hidden_size / num_attention_heads
        "use_bias": attention_of(a).bias,
        "sliding_window": attention_of(a).window,
    }


_STARCODER2_7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4608,
    "intermediate_size": 18_432,
    "num_attention_heads": 36,
    "num_key_value_heads": 4,
    "vocab_size": 49_152,
    "max_position_embeddings": 16_384,
    "attention_dropout": 0.1,
    "rope_theta": 1_000_000.0,
    "sliding_window": 4096,
    "residual_dropout": 0.1,
    "embedding_dropout": 0.1,
}

FAMILY = Family(
    name="starcoder2",
    title="StarCoder2",
    hf_class="Starcoder2ForCausalLM",
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "starcoder2-tiny": {
            **_STARCODER2_7B,
            **TINY,
            "attention_dropout": 0.0,
            "sliding_window": 96,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
        },
        "starcoder2-3b": {
            **_STARCODER2_7B,
            "num_hidden_layers": 30,
            "hidden_size": 3072,
            "intermediate_size": 12_288,
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "rope_theta": 999_999.4420358813,
        },
        "starcoder2-7b": _STARCODER2_7B,
    },
)
