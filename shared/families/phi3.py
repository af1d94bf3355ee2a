"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: LLaMA with fused QKV `[q ; k ; v]` and fused `[gate ; up]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.families.common.decoder import attention_of, read_decoder, rotary_of, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import TINY, Family

_NAMES = Names(qkv=("self_attn.qkv_proj",), fc1=("mlp.gate_up_proj",))


def without_legacy_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first uploads call longrope `su`."""
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return config
    kinds = {name: "longrope" for name in ("type", "rope_type") if scaling.get(name) == "su"}
    return {**config, "rope_scaling": scaling | kinds}


def read(fields: Fields) -> Architecture:
    """The 128k models have longrope."""
    window = fields.optional("sliding_window", int)
    decoder = read_decoder(fields, default_epsilon=1e-5, rotary_fraction=1.0)
    fields.expect("attention_bias", False, why="transformers ignores it")
    fields.expect("mlp_bias", False, why="transformers ignores it")
    fields.expect("lm_head_bias", False, why="transformers ignores it")
    for name in ("full_attn_mod", "interpolate_factor"):
        fields.expect(name, 1, why="transformers ignores other values")
    fields.ignore("original_max_position_embeddings")  # no effect without longrope
    scaling = decoder.rotary.scaling
    if scaling and scaling.kind != "longrope":
        raise UserError(
            f"config.json: rope_scaling of type {scaling.kind} is not supported: this family has longrope only"
        )
    return decoder.build("phi3", attention={"window": window})


def write(a: Architecture) -> dict[str, Any]:
    # head_dim is always hidden_size / num_attention_heads.
    fields = write_decoder(a, partial=True, head_dim=False) | {"sliding_window": attention_of(a).window}
    if scaling := rotary_of(a).scaling:  # top level: read first by transformers
        fields["original_max_position_embeddings"] = scaling.original_length
    return fields


_PHI_4 = {
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "intermediate_size": 17_920,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "vocab_size": 100_352,
    "max_position_embeddings": 16_384,
    "rope_theta": 250_000.0,
}
_PHI3_TINY = {**_PHI_4, **TINY, "partial_rotary_factor": 0.75}
_PHI_3_MINI_4K = {
    "num_hidden_layers": 32,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "vocab_size": 32_064,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
}

_PHI_4_MINI_LONG = [
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533,
    5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651,
    14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03,
    32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip

FAMILY = Family(
    name="phi3",
    title="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    hf_class="Phi3ForCausalLM",
    without_legacy_names=without_legacy_names,
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "phi3-tiny": _PHI3_TINY,
        # 128 tokens: short factors; 256 tokens: long factors.
        "phi3-tiny-longrope": {
            **_PHI3_TINY,
            "rope_scaling": {
                "rope_type": "longrope",
                "factor": 4.0,
                "original_max_position_embeddings": 192,
                "short_factor": [1.0, 1.0, 1.25, 1.5, 1.75, 2.0],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 9.0],
            },
        },
        "phi-3-mini-4k": _PHI_3_MINI_4K,
        "phi-4": _PHI_4,
        "phi-4-mini": {
            **_PHI_3_MINI_4K,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "vocab_size": 200_064,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "rope_type": "longrope",
                "original_max_position_embeddings": 4096,
                "short_factor": [1.0] * 48,
                "long_factor": _PHI_4_MINI_LONG,
            },
            "sliding_window": 262_144,
        },
    },
)
