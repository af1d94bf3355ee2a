"""GLM-4-9B in transformers: interleaved RoPE on half of each head, fused gate and up."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import TINY, Family

_NAMES = Names(fc1=("mlp.gate_up_proj",))


def read(fields: Fields) -> Architecture:
    """`attention_bias`: biases of q, k and v only."""
    decoder = read_decoder(
        fields, default_epsilon=1.5625e-7, rotary_fraction=0.5, interleaved=True, default_head_dim=128
    )
    return decoder.build("glm", attention={"bias": fields.get("attention_bias", bool, True)})


def write(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a, partial=True), "attention_bias": attention_of(a).bias}


_GLM_4_9B = {
    "num_hidden_layers": 40,
    "hidden_size": 4096,
    "intermediate_size": 13_696,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "vocab_size": 151_552,
    "max_position_embeddings": 131_072,
}

FAMILY = Family(
    name="glm",
    title="GLM-4-9B",
    hf_class="GlmForCausalLM",
    matches=lambda config: "max_sequence_length" not in config,
    read=read,
    names=_NAMES,
    write=write,
    size_configs={"glm-tiny": {**_GLM_4_9B, **TINY, "head_dim": 16}, "glm-4-9b": _GLM_4_9B},
)
