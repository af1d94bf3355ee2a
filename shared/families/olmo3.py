"""OLMo 3: OLMo 2; of 4 layers, 3 have a sliding window, 1 full attention with RoPE scaling."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, Rotary
from shared.errors import UserError
from shared.families.common.decoder import attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.sliding_windows import every, read_windows, windowed, write_rope_by_kind, write_windows
from shared.families.family import TINY, Family
from shared.families.olmo2 import NAMES

_THETA = 500_000.0


def read(fields: Fields) -> Architecture:
    """A base other than the default needs `rope_parameters`: transformers 5 applies `rope_theta` to full layers only."""
    decoder = read_decoder(fields, default_theta=_THETA, default_epsilon=1e-5, rope_by_kind=True)
    windows = read_windows(fields, decoder.num_layers, 4096, every(4, decoder.num_layers))
    theta, local = decoder.rotary.theta, decoder.local_theta
    if local is None and theta != _THETA:
        raise UserError(
            f"config.json: transformers 4 and 5 read rope_theta {theta} differently for sliding-window layers; "
            "give rope_parameters for full_attention and sliding_attention instead"
        )
    bias = fields.get("attention_bias", bool, False)
    return decoder.build(
        "olmo3",
        norm_placement="post",
        attention={"qk_norm": "projection", "bias": bias, "output_bias": bias},
        vary=windowed(windows, rotary=Rotary(theta=_THETA if local is None else local)),
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a, head_dim=False),  # always hidden_size / num_attention_heads
        **write_rope_by_kind(a),
        **write_windows(a),
        "attention_bias": attention_of(a).bias,
    }


_OLMO_3_7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "vocab_size": 100_278,
    "max_position_embeddings": 65_536,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
    },
}

FAMILY = Family(
    name="olmo3",
    title="OLMo 3",
    hf_class="Olmo3ForCausalLM",
    read=read,
    names=NAMES,
    write=write,
    size_configs={
        "olmo3-tiny": {
            **_OLMO_3_7B,
            **TINY,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            "sliding_window": 96,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "olmo-3-7b": _OLMO_3_7B,
        "olmo-3-32b": {
            **_OLMO_3_7B,
            "num_hidden_layers": 64,
            "hidden_size": 5120,
            "intermediate_size": 27_648,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
    },
)
