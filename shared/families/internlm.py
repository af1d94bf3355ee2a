"""InternLM 1: LLaMA with biases in attention, and `rotary` for the rotary embedding."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, RopeScaling
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, table, written_fields
from shared.families.common.fields import Fields
from shared.families.family import Family, tiny


def read(fields: Fields) -> Architecture:
    """`rotary` has a base and a type: `origin`, or `dynamic`, whose `scaling_factor` is 1 unless given."""
    bias, common = fields.get("bias", bool, True), common_fields(fields)
    fields.expect("num_key_value_heads", common["num_attention_heads"], why="every head has its own keys and values")
    rotary = Fields(fields.optional("rotary", dict) or {"type": "origin"})
    rotary.expect("type", "origin", "dynamic", why="computed here: origin, dynamic")
    factor = rotary.get("scaling_factor", float, 1.0)
    common |= {
        "rope_theta": rotary.get("base", float, 10_000.0),
        "rope_scaling": RopeScaling(kind="dynamic", factor=factor) if rotary.get("type", str) == "dynamic" else None,
    }
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        fields.expect(name, why="InternLM's rotary embedding is in `rotary`")
    rotary.finish("internlm (rotary)")
    return nested(family="internlm", qkv_bias=bias, attention_output_bias=bias, **common)


def write(a: Architecture) -> dict[str, Any]:
    written = {name: value for name, value in written_fields(a).items() if not name.startswith("rope_")}
    rotary: dict[str, Any] = {"base": a.rope_theta, "type": "origin"}
    if a.rope_scaling:
        rotary |= {"type": "dynamic", "scaling_factor": a.rope_scaling.factor}
    return {**written, "bias": a.qkv_bias, "rotary": rotary}


_INTERNLM_7B = nested(
    family="internlm",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11_008,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=128,
    vocab_size=103_168,
    max_position_embeddings=2048,
    norm_epsilon=1e-6,
    qkv_bias=True,
    attention_output_bias=True,
    tied_embeddings=False,
)

FAMILY = Family(
    name="internlm",
    title="InternLM 1",
    hf_class="InternLMForCausalLM",
    remote=True,
    read=read,
    table=table,
    write=write,
    sizes={
        "internlm-tiny": tiny(_INTERNLM_7B, num_query_groups=4),
        "internlm-7b": _INTERNLM_7B,
        "internlm-20b": replace(
            _INTERNLM_7B,
            num_layers=60,
            hidden_size=5120,
            ffn_hidden_size=13_824,
            num_attention_heads=40,
            num_query_groups=40,
            max_position_embeddings=4096,
            rope_scaling=RopeScaling(kind="dynamic", factor=1.0),
            qkv_bias=False,
            attention_output_bias=False,
        ),
    },
)
