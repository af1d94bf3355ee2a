"""Yi with its first remote code: LLaMA with other norm names. Later uploads of the same models are LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import TINY, Family


def read(fields: Fields) -> Architecture:
    """`num_key_value_heads` is always given in the published files."""
    fields.get("num_key_value_heads", int)
    return read_decoder(fields, default_theta=5_000_000.0, default_epsilon=1e-5).build("yi")


def write(a: Architecture) -> dict[str, Any]:
    return write_decoder(a)


_YI_6B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 64_000,
    "max_position_embeddings": 4096,
}

FAMILY = Family(
    name="yi",
    title="Yi as first published",
    hf_class="YiForCausalLM",
    remote=True,
    model_types=("Yi",),
    read=read,
    names=Names(attention_norm="ln1", mlp_norm="ln2"),
    write=write,
    size_configs={
        "yi-tiny": {**_YI_6B, **TINY},
        "yi-6b": _YI_6B,
        "yi-34b": {
            **_YI_6B,
            "num_hidden_layers": 60,
            "hidden_size": 7168,
            "intermediate_size": 20_480,
            "num_attention_heads": 56,
            "num_key_value_heads": 8,
        },
    },
)
