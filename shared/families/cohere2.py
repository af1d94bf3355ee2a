"""Command-R7B, Command-A: Command-R; of 4 layers, 3 have sliding window and RoPE, 1 full attention without RoPE."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.cohere import SPELLING
from shared.families.common.decoder import attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.sliding_windows import every, read_windows, windowed, write_windows
from shared.families.family import TINY, Family


def read(fields: Fields) -> Architecture:
    """Full-attention layers have no RoPE."""
    pattern = fields.get("sliding_window_pattern", int, 4)
    fields.expect("layer_switch", pattern, why="it must equal sliding_window_pattern")
    fields.expect("order_of_interleaved_layers", "local_attn_first", why="supported: local_attn_first")
    fields.expect("position_embedding_type", "rope_gptj", why="supported: rope_gptj")
    fields.expect("rotary_pct", 1, 1.0, why="partial RoPE is not supported for this family")
    for name in ("use_embedding_sharing", "use_gated_activation", "use_parallel_block"):
        fields.expect(name, True, why="transformers ignores other values")
    fields.ignore("cache_implementation", "use_parallel_embedding")
    bias = fields.get("attention_bias", bool, False)
    decoder = read_decoder(fields, SPELLING, interleaved=True, default_epsilon=1e-5, tied=True)
    windows = read_windows(fields, decoder.num_layers, 4096, every(pattern, decoder.num_layers))
    return decoder.build(
        "cohere2",
        norm={"kind": "layernorm"},
        residual={"kind": "parallel_shared"},
        attention={"rotary": None, "bias": bias, "output_bias": bias},
        head={"multiplier": fields.get("logit_scale", float, 0.0625)},
        vary=windowed(windows, rotary=decoder.rotary),
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a, SPELLING),
        **write_windows(a),
        "logit_scale": a.head.multiplier,
        "attention_bias": attention_of(a).bias,
    }


_COMMAND_R7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
    "rope_theta": 50_000.0,
    "logit_scale": 0.25,
}

FAMILY = Family(
    name="cohere2",
    title="Command-R7B, Command-A",
    hf_class="Cohere2ForCausalLM",
    read=read,
    write=write,
    size_configs={
        "cohere2-tiny": {
            **_COMMAND_R7B,
            **TINY,
            "sliding_window": 96,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "command-r7b": _COMMAND_R7B,
        "command-a": {
            **_COMMAND_R7B,
            "num_hidden_layers": 64,
            "hidden_size": 12_288,
            "intermediate_size": 36_864,
            "num_attention_heads": 96,
            "max_position_embeddings": 131_072,
        },
    },
)
