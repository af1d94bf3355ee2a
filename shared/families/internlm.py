"""InternLM 1: LLaMA with attention biases, and RoPE in the field `rotary`."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, RopeScaling, Rotary
from shared.families.common.decoder import attention_of, read_decoder, rotary_of, write_decoder
from shared.families.common.fields import Fields
from shared.families.family import TINY, Family


def read(fields: Fields) -> Architecture:
    """`rotary`: `base` and `type` (`origin`, or `dynamic` with `scaling_factor`, default 1)."""
    bias, decoder = fields.get("bias", bool, True), read_decoder(fields)
    fields.expect("num_key_value_heads", decoder.heads, why="this family has MHA: as many as num_attention_heads")
    given = Fields(fields.optional("rotary", dict) or {"type": "origin"})
    given.expect("type", "origin", "dynamic", why="supported: origin, dynamic")
    factor = given.get("scaling_factor", float, 1.0)
    rotary = Rotary(
        theta=given.get("base", float, 10_000.0),
        scaling=RopeScaling(kind="dynamic", factor=factor) if given.get("type", str) == "dynamic" else None,
    )
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        fields.expect(name, why="RoPE is in the field `rotary` in this family")
    given.finish("internlm (rotary)")
    return decoder.build("internlm", attention={"rotary": rotary, "bias": bias, "output_bias": bias})


def write(a: Architecture) -> dict[str, Any]:
    of_layers = rotary_of(a)
    rotary: dict[str, Any] = {"base": of_layers.theta, "type": "origin"}
    if of_layers.scaling:
        rotary |= {"type": "dynamic", "scaling_factor": of_layers.scaling.factor}
    return {**write_decoder(a, rotary=False), "bias": attention_of(a).bias, "rotary": rotary}


_INTERNLM_7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "vocab_size": 103_168,
    "max_position_embeddings": 2048,
}

FAMILY = Family(
    name="internlm",
    title="InternLM 1",
    hf_class="InternLMForCausalLM",
    remote=True,
    read=read,
    write=write,
    size_configs={
        "internlm-tiny": {**_INTERNLM_7B, **TINY, "num_key_value_heads": 4},
        "internlm-7b": _INTERNLM_7B,
        "internlm-20b": {
            **_INTERNLM_7B,
            "num_hidden_layers": 60,
            "hidden_size": 5120,
            "intermediate_size": 13_824,
            "num_attention_heads": 40,
            "max_position_embeddings": 4096,
            "bias": False,
            "rotary": {"type": "dynamic"},
        },
    },
)
