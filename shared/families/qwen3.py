"""Qwen3, dense: no biases, QK norm over head_dim, explicit head_dim."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.sliding_windows import read_optional_windows, windowed, write_optional_windows
from shared.families.family import TINY, Family

_DEFAULT_HEAD_DIM = 128  # not hidden_size / num_attention_heads


def read(fields: Fields) -> Architecture:
    bias = fields.get("attention_bias", bool, False)
    decoder = read_decoder(fields, default_head_dim=_DEFAULT_HEAD_DIM)
    full = range(fields.get("max_window_layers", int, 28))
    windows = read_optional_windows(fields, decoder.num_layers, full)
    attention = {"qk_norm": "head", "bias": bias, "output_bias": bias}
    return decoder.build("qwen3", attention=attention, vary=windowed(windows))


def write(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), "attention_bias": attention_of(a).bias, **write_optional_windows(a)}


_QWEN3_8B = {
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
}
_QWEN3_TINY = {**_QWEN3_8B, **TINY, "head_dim": 32}

FAMILY = Family(
    name="qwen3",
    title="Qwen3 (dense)",
    hf_class="Qwen3ForCausalLM",
    read=read,
    write=write,
    size_configs={
        "qwen3-tiny": _QWEN3_TINY,
        # Qwen's recommended RoPE scaling.
        "qwen3-tiny-yarn": {
            **_QWEN3_TINY,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        },
        "qwen3-0.6b": {
            **_QWEN3_8B,
            "num_hidden_layers": 28,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
        "qwen3-8b": _QWEN3_8B,
    },
)
