"""Mistral 7B, Nemo, Small and Codestral: LLaMA; sliding window in the first ones."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.family import TINY, Family


def read(fields: Fields) -> Architecture:
    """`sliding_window`: 4096 if absent (transformers' default), none if null."""
    decoder = read_decoder(fields)
    window = fields.nullable("sliding_window", int, 4096)
    fields.expect(
        "layer_types",
        [("full" if window is None else "sliding") + "_attention"] * decoder.num_layers,
        why="all layers of this family have the same attention",
    )
    return decoder.build("mistral", attention={"window": window})


def write(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), "sliding_window": attention_of(a).window}


_MISTRAL_7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-05,
}

FAMILY = Family(
    name="mistral",
    title="Mistral 7B, Nemo, Small, Codestral",
    hf_class="MistralForCausalLM",
    read=read,
    write=write,
    size_configs={
        "mistral-tiny": {**_MISTRAL_7B, **TINY, "sliding_window": 96},
        "mistral-7b": _MISTRAL_7B,
        "mistral-nemo-12b": {
            **_MISTRAL_7B,
            "num_hidden_layers": 40,
            "hidden_size": 5120,
            "head_dim": 128,
            "vocab_size": 131_072,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
        },
    },
)
