"""OLMo 2: post norms only, QK norm over the whole projection."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import TINY, Family

NAMES = Names(post_attention_norm="post_attention_layernorm", post_mlp_norm="post_feedforward_layernorm")


def read(fields: Fields) -> Architecture:
    bias = fields.get("attention_bias", bool, False)
    return read_decoder(fields, default_epsilon=1e-5).build(
        "olmo2", norm_placement="post", attention={"qk_norm": "projection", "bias": bias, "output_bias": bias}
    )


def write(a: Architecture) -> dict[str, Any]:
    # head_dim is always hidden_size / num_attention_heads.
    return {**write_decoder(a, head_dim=False), "attention_bias": attention_of(a).bias}


_OLMO_2_7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "vocab_size": 100_352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500_000.0,
}

FAMILY = Family(
    name="olmo2",
    title="OLMo 2",
    hf_class="Olmo2ForCausalLM",
    read=read,
    names=NAMES,
    write=write,
    size_configs={
        "olmo2-tiny": {**_OLMO_2_7B, **TINY},
        "olmo-2-7b": _OLMO_2_7B,
        "olmo-2-13b": {
            **_OLMO_2_7B,
            "num_hidden_layers": 40,
            "hidden_size": 5120,
            "intermediate_size": 13_824,
            "num_attention_heads": 40,
        },
    },
)
