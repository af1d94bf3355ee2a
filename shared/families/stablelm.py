"""StableLM 3B, 2-1.6B and 2-12B: LayerNorm, RoPE on a quarter of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import Spelling, attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields, renamed
from shared.families.common.tensor_table import Names
from shared.families.family import TINY, Family

_NAMES = Names(q_norm="self_attn.q_layernorm.norms.{query_head}", k_norm="self_attn.k_layernorm.norms.{key_head}")


def without_legacy_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Legacy names of `stablelm_epoch`, the remote code of the first uploads."""
    names = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor", "num_heads": "num_attention_heads"}
    return renamed(config, names)


_SPELLING = Spelling(epsilon="layer_norm_eps")


def read(fields: Fields) -> Architecture:
    """`use_parallel_residual`: parallel residual with one norm."""
    fields.expect("rotary_scaling_factor", 1, 1.0, why="RoPE scaling is not supported for this family")
    parallel = fields.get("use_parallel_residual", bool, False)
    return read_decoder(fields, _SPELLING, default_epsilon=1e-5, rotary_fraction=0.25).build(
        "stablelm",
        norm={"kind": "layernorm", "bias": True},
        residual={"kind": "parallel_shared" if parallel else "sequential"},
        attention={
            "bias": fields.get("use_qkv_bias", bool, False),
            "qk_norm": "each_head" if fields.get("qk_layernorm", bool, False) else None,
        },
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a, _SPELLING, partial=True, head_dim=False),  # always hidden_size / num_attention_heads
        "use_qkv_bias": attention_of(a).bias,
        "use_parallel_residual": a.layers[0].residual.kind == "parallel_shared",
        "qk_layernorm": attention_of(a).qk_norm is not None,
    }


_STABLELM_3B_4E1T = {
    "num_hidden_layers": 32,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_attention_heads": 32,
    "vocab_size": 50_304,
    "max_position_embeddings": 4096,
}
_STABLELM_TINY_PARALLEL = {**_STABLELM_3B_4E1T, **TINY, "use_parallel_residual": True}

FAMILY = Family(
    name="stablelm",
    title="StableLM 3B, StableLM 2 1.6B and 12B",
    hf_class="StableLmForCausalLM",
    other_classes=("StableLMEpochForCausalLM",),  # first uploads
    model_types=("stablelm", "stablelm_epoch"),
    without_legacy_names=without_legacy_names,
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "stablelm-tiny": {**_STABLELM_3B_4E1T, **TINY, "use_qkv_bias": True},
        "stablelm-tiny-parallel": _STABLELM_TINY_PARALLEL,
        "stablelm-tiny-qk-norm": {**_STABLELM_TINY_PARALLEL, "qk_layernorm": True},
        "stablelm-2-1.6b": {
            **_STABLELM_3B_4E1T,
            "num_hidden_layers": 24,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "vocab_size": 100_352,
            "use_qkv_bias": True,
        },
        "stablelm-2-12b": {
            **_STABLELM_3B_4E1T,
            "num_hidden_layers": 40,
            "hidden_size": 5120,
            "intermediate_size": 13_824,
            "num_key_value_heads": 8,
            "vocab_size": 100_352,
            "use_parallel_residual": True,
            "qk_layernorm": True,
        },
        "stablelm-3b-4e1t": _STABLELM_3B_4E1T,
    },
)
