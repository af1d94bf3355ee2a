"""LLaMA 1 to 3.3, CodeLLaMA, and models published as LlamaForCausalLM: Yi, DeepSeek v1 and Coder, Falcon 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import attention_of, mlp_of, read_decoder, write_decoder
from shared.families.common.fields import Fields, renamed
from shared.families.family import TINY, Family


def without_legacy_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Legacy names of uploads from before transformers had LlamaForCausalLM."""
    return renamed(config, {"max_sequence_length": "max_position_embeddings"})


def read(fields: Fields) -> Architecture:
    """`attention_bias`: of q, k, v and o; `mlp_bias`: of gate, up and down."""
    bias = fields.get("attention_bias", bool, False)
    return read_decoder(fields).build(
        "llama", attention={"bias": bias, "output_bias": bias}, mlp={"bias": fields.get("mlp_bias", bool, False)}
    )


def write(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), "attention_bias": attention_of(a).bias, "mlp_bias": mlp_of(a).bias}


_LLAMA_2_7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
}
_LLAMA_3_1_8B = {
    **_LLAMA_2_7B,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
_LLAMA_50M = {
    **_LLAMA_2_7B,
    "num_hidden_layers": 10,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
_LLAMA_5M = {
    **_LLAMA_50M,
    "num_hidden_layers": 6,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}

FAMILY = Family(
    name="llama",
    title="LLaMA 1, 2, 3.x, CodeLLaMA, Yi, DeepSeek v1, Falcon 3",
    hf_class="LlamaForCausalLM",
    other_classes=("LLaMAForCausalLM",),  # first uploads
    without_legacy_names=without_legacy_names,
    read=read,
    write=write,
    size_configs={
        "tiny": {**_LLAMA_2_7B, **TINY},
        "llama-5m": _LLAMA_5M,
        "llama-20m": {
            **_LLAMA_5M,
            "num_hidden_layers": 8,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_attention_heads": 6,
            "vocab_size": 16_384,
        },
        "llama-50m": _LLAMA_50M,
        "llama-100m": {
            **_LLAMA_50M,
            "num_hidden_layers": 12,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
        "llama-2-7b": _LLAMA_2_7B,
        "llama-3.2-1b": {
            **_LLAMA_3_1_8B,
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "tie_word_embeddings": True,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
        "llama-3.1-8b": _LLAMA_3_1_8B,
    },
)
