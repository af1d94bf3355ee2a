"""GPT-J: parallel residual with one norm, interleaved RoPE, output layer with bias."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, Rotary
from shared.families.common.fields import Fields
from shared.families.common.gpt_fields import read_gpt, write_gpt
from shared.families.common.tensor_table import Names
from shared.families.family import Family

_NAMES = Names(
    embedding="transformer.wte",
    layer="transformer.h.{layer}.",
    attention_norm="ln_1",
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    proj="attn.out_proj",
    fc1=("mlp.fc_in",),
    fc2="mlp.fc_out",
    final_norm="transformer.ln_f",
    pass_through=("attn.bias", "attn.masked_bias"),
)


def read(fields: Fields) -> Architecture:
    fields.expect("rotary", True, why="this family has RoPE")
    decoder = read_gpt(fields, dropout=0.0, default_activation="gelu_new", tied=False)
    rotated = fields.get("rotary_dim", int, 64)
    return decoder.build(
        "gptj",
        residual={"kind": "parallel_shared"},
        attention={"rotary": Rotary(dim=None if rotated == decoder.head_dim else rotated, interleaved=True)},
        head={"bias": True},
    )


def write(a: Architecture) -> dict[str, Any]:
    return {**write_gpt(a), "rotary_dim": a.attention.rotary_dim}


_GPT_J_6B = {"n_layer": 28, "n_embd": 4096, "n_head": 16, "vocab_size": 50_400, "n_positions": 2048}

FAMILY = Family(
    name="gptj",
    title="GPT-J",
    hf_class="GPTJForCausalLM",
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "gptj-tiny": {
            **_GPT_J_6B,
            "n_layer": 2,
            "n_embd": 64,
            "n_inner": 160,
            "n_head": 4,
            "vocab_size": 512,
            "n_positions": 512,
            "rotary_dim": 8,
        },
        "gpt-j-6b": _GPT_J_6B,
    },
)
