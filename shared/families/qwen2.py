"""Qwen 1.5, 2, 2.5 and QwQ, dense: LLaMA with biases of q, k and v."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.sliding_windows import (
    limit_to_first_chunk,
    read_optional_windows,
    windowed,
    write_optional_windows,
)
from shared.families.family import TINY, Family


def read(fields: Fields) -> Architecture:
    decoder = limit_to_first_chunk(fields, read_decoder(fields))
    full = range(fields.get("max_window_layers", int, 28))
    windows = read_optional_windows(fields, decoder.num_layers, full)
    return decoder.build("qwen2", attention={"bias": True}, vary=windowed(windows))


def write(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), **write_optional_windows(a)}


_QWEN2_5_0_5B = {
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "rope_theta": 1_000_000.0,
}
_QWEN2_TINY = {**_QWEN2_5_0_5B, **TINY}

FAMILY = Family(
    name="qwen2",
    title="Qwen 1.5, 2, 2.5, QwQ (dense)",
    hf_class="Qwen2ForCausalLM",
    read=read,
    write=write,
    size_configs={
        "qwen2-tiny": _QWEN2_TINY,
        "qwen2-tiny-window": {
            **_QWEN2_TINY,
            "use_sliding_window": True,
            "sliding_window": 96,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "qwen2.5-0.5b": _QWEN2_5_0_5B,
        "qwen2.5-7b": {
            **_QWEN2_5_0_5B,
            "num_hidden_layers": 28,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152_064,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
        },
    },
)
