"""Phi-3, Phi-3.5 and Phi-4: LLaMA with one fused QKV and one fused gate and up projection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shared.families.decoder import common_fields, written_fields
from shared.families.family import Family, tiny
from shared.families.fields import Fields
from shared.families.tensors import Names, decoder_table
from shared.mapping.rule import Table
from shared.model.architecture import Architecture

_NAMES = Names(qkv=("self_attn.qkv_proj",), fc1=("mlp.gate_up_proj",))


def read(fields: Fields) -> Architecture:
    """The models of 128k positions have longrope frequencies, which are refused."""
    window = fields.optional("sliding_window", int)
    common = common_fields(fields, default_epsilon=1e-5, rotary_fraction=1.0)
    for name in ("resid_pdrop", "embd_pdrop"):
        fields.expect(name, 0, 0.0, why="train without dropout, or set it to 0.0")
    fields.expect("attention_bias", False, why="transformers computes none")
    fields.expect("mlp_bias", False, why="transformers computes none")
    fields.ignore("original_max_position_embeddings")  # of longrope
    return Architecture(family="phi3", sliding_window=window, **common)


def write(a: Architecture) -> dict[str, Any]:
    fields = written_fields(a, partial=True) | {"sliding_window": a.sliding_window}
    del fields["head_dim"]  # always hidden_size / num_attention_heads
    return fields


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_PHI_4 = Architecture(
    family="phi3",
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=17_920,
    num_attention_heads=40,
    num_query_groups=10,
    head_dim=128,
    vocab_size=100_352,
    max_position_embeddings=16_384,
    norm_epsilon=1e-5,
    rope_theta=250_000.0,
    tied_embeddings=False,
)

FAMILY = Family(
    name="phi3",
    title="Phi-3, Phi-3.5, Phi-4",
    hf_class="Phi3ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "phi3-tiny": tiny(_PHI_4, rotary_dim=12),
        "phi-3-mini-4k": replace(
            _PHI_4,
            num_layers=32,
            hidden_size=3072,
            ffn_hidden_size=8192,
            num_attention_heads=32,
            num_query_groups=32,
            head_dim=96,
            vocab_size=32_064,
            max_position_embeddings=4096,
            rope_theta=10_000.0,
            sliding_window=2047,
        ),
        "phi-4": _PHI_4,
    },
)
