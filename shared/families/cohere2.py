"""Command-R7B, Command-A: Command-R with a window and rotation in three of four layers, neither in the fourth."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, table, written_fields
from shared.families.common.fields import Fields
from shared.families.common.sliding_windows import every, window_fields, written_window_fields
from shared.families.family import Family, tiny


def read(fields: Fields) -> Architecture:
    """Layers without a window have no rotation."""
    pattern = fields.get("sliding_window_pattern", int, 4)
    fields.expect("layer_switch", pattern, why="it is the same as sliding_window_pattern")
    fields.expect("order_of_interleaved_layers", "local_attn_first", why="computed here: local_attn_first")
    fields.expect("position_embedding_type", "rope_gptj", why="computed here: rope_gptj")
    fields.expect("rotary_pct", 1, 1.0, why="whole heads are rotated")
    for name in ("use_embedding_sharing", "use_gated_activation", "use_parallel_block"):
        fields.expect(name, True, why="transformers computes no other")
    fields.ignore("cache_implementation", "use_parallel_embedding")
    bias = fields.get("attention_bias", bool, False)
    common = common_fields(fields, epsilon="layer_norm_eps", default_epsilon=1e-5, tied=True)
    windows = window_fields(fields, common["num_layers"], 4096, every(pattern, common["num_layers"]))
    everything = windows["sliding_window"] is None
    return nested(
        family="cohere2",
        norm="layernorm",
        residual="parallel_shared",
        rotary_interleaved=True,
        layers_without_rope=tuple(range(common["num_layers"])) if everything else windows["full_attention_layers"],
        logit_multiplier=fields.get("logit_scale", float, 0.0625),
        qkv_bias=bias,
        attention_output_bias=bias,
        **common | windows,
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **written_fields(a, epsilon="layer_norm_eps"),
        **written_window_fields(a),
        "logit_scale": a.logit_multiplier,
        "attention_bias": a.qkv_bias,
    }


_COMMAND_R7B = nested(
    family="cohere2",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14_336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=256_000,
    max_position_embeddings=8192,
    norm="layernorm",
    norm_epsilon=1e-5,
    residual="parallel_shared",
    rope_theta=50_000.0,
    rotary_interleaved=True,
    layers_without_rope=every(4, 32),
    sliding_window=4096,
    full_attention_layers=every(4, 32),
    logit_multiplier=0.25,
    tied_embeddings=True,
)

FAMILY = Family(
    name="cohere2",
    title="Command-R7B, Command-A",
    hf_class="Cohere2ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "cohere2-tiny": tiny(_COMMAND_R7B, layers_without_rope=(1,), sliding_window=96, full_attention_layers=(1,)),
        "command-r7b": _COMMAND_R7B,
        "command-a": replace(
            _COMMAND_R7B,
            num_layers=64,
            hidden_size=12_288,
            ffn_hidden_size=36_864,
            num_attention_heads=96,
            layers_without_rope=every(4, 64),
            full_attention_layers=every(4, 64),
            max_position_embeddings=131_072,
        ),
    },
)
