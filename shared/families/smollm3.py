"""SmolLM3: LLaMA without RoPE in every fourth layer."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, Attention
from shared.errors import UserError
from shared.families.common.decoder import attention_of, mlp_of, read_decoder, with_mixer, write_decoder
from shared.families.common.fields import Fields
from shared.families.family import TINY, Family


def read(fields: Fields) -> Architecture:
    """`no_rope_layers`: 1 for layers with RoPE, 0 for layers without."""
    bias = fields.get("attention_bias", bool, False)
    decoder = read_decoder(fields, default_theta=2_000_000.0, tied=True)
    layers = decoder.num_layers
    fields.expect("use_sliding_window", False, why="sliding-window attention is not supported for this family")
    fields.expect("layer_types", ["full_attention"] * layers, why="sliding-window attention is not supported")
    fields.ignore("sliding_window", "max_window_layers")  # no effect with use_sliding_window false
    interval = fields.get("no_rope_layer_interval", int, 4)
    default = [int((index + 1) % interval != 0) for index in range(layers)]
    rotated = fields.get("no_rope_layers", list, default)[:layers]
    if len(rotated) < layers or set(rotated) - {0, 1}:
        raise UserError(f"config.json: no_rope_layers is {rotated!r}; 0 or 1 is required for each of {layers} layers")
    return decoder.build(
        "smollm3",
        attention={"bias": bias, "output_bias": bias},
        mlp={"bias": fields.get("mlp_bias", bool, False)},
        vary=lambda index, layer: layer if rotated[index] else with_mixer(layer, rotary=None),
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a, head_dim=False),  # always hidden_size / num_attention_heads
        "no_rope_layers": [
            int(isinstance(layer.mixer, Attention) and layer.mixer.rotary is not None) for layer in a.layers
        ],
        "use_sliding_window": False,
        "attention_bias": attention_of(a).bias,
        "mlp_bias": mlp_of(a).bias,
    }


_SMOLLM3_3B = {
    "num_hidden_layers": 36,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 128_256,
    "max_position_embeddings": 65_536,
    "rope_theta": 5_000_000.0,
}

FAMILY = Family(
    name="smollm3",
    title="SmolLM3",
    hf_class="SmolLM3ForCausalLM",
    read=read,
    write=write,
    size_configs={"smollm3-tiny": {**_SMOLLM3_3B, **TINY, "no_rope_layers": [1, 0]}, "smollm3-3b": _SMOLLM3_3B},
)
