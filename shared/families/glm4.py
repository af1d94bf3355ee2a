"""GLM-4-0414: GLM-4-9B with sandwich norms."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import TINY, Family

_NAMES = Names(
    fc1=("mlp.gate_up_proj",), post_attention_norm="post_self_attn_layernorm", post_mlp_norm="post_mlp_layernorm"
)


def read(fields: Fields) -> Architecture:
    """`attention_bias`: biases of q, k and v only."""
    decoder = read_decoder(
        fields, default_epsilon=1.5625e-7, rotary_fraction=0.5, interleaved=True, default_head_dim=128
    )
    bias = fields.get("attention_bias", bool, True)
    return decoder.build("glm4", attention={"bias": bias}, norm_placement="sandwich")


def write(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a, partial=True), "attention_bias": attention_of(a).bias}


_GLM_4_9B_0414 = {
    "num_hidden_layers": 40,
    "hidden_size": 4096,
    "intermediate_size": 13_696,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "vocab_size": 151_552,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-05,
    "attention_bias": False,
}

FAMILY = Family(
    name="glm4",
    title="GLM-4-0414 (9B, 32B), GLM-Z1",
    hf_class="Glm4ForCausalLM",
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "glm4-tiny": {**_GLM_4_9B_0414, **TINY, "head_dim": 16},
        "glm-4-9b-0414": _GLM_4_9B_0414,
        "glm-4-32b-0414": {
            **_GLM_4_9B_0414,
            "num_hidden_layers": 61,
            "hidden_size": 6144,
            "intermediate_size": 23_040,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
        },
    },
)
