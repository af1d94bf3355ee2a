"""GPT-2: learned positions, transposed weights `[in, out]` (Conv1D)."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, LearnedPositions
from shared.families.common.decoder import attention_of
from shared.families.common.fields import Fields
from shared.families.common.gpt_fields import read_gpt, write_gpt
from shared.families.common.tensor_table import Names
from shared.families.family import Family

_NAMES = Names(
    prefix="transformer.",
    embedding="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h.{layer}.",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv=("attn.c_attn",),
    proj="attn.c_proj",
    fc1=("mlp.c_fc",),
    fc2="mlp.c_proj",
    final_norm="transformer.ln_f",
    transposed=True,
    pass_through=("attn.bias", "attn.masked_bias"),
)


def read(fields: Fields) -> Architecture:
    fields.expect("add_cross_attention", False, why="cross attention is not supported")
    fields.ignore("reorder_and_upcast_attn")  # rounding of scores below fp32
    return read_gpt(fields, dropout=0.1, default_activation="gelu_new", tied=True).build(
        "gpt2",
        embedding={"positions": LearnedPositions()},
        attention={
            "bias": True,
            "output_bias": True,
            "scale_by_layer": fields.get("scale_attn_by_inverse_layer_idx", bool, False),
        },
    )


def write(a: Architecture) -> dict[str, Any]:
    return {**write_gpt(a), "scale_attn_by_inverse_layer_idx": attention_of(a).scale_by_layer}


_GPT2 = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50_257, "n_positions": 1024}
_GPT2_TINY = {
    **_GPT2,
    "n_layer": 2,
    "n_embd": 64,
    "n_inner": 160,
    "n_head": 4,
    "vocab_size": 512,
    "n_positions": 512,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}

FAMILY = Family(
    name="gpt2",
    title="GPT-2, Cerebras-GPT, DistilGPT-2, Mistral's GPT-2s, BioMedLM",
    hf_class="GPT2LMHeadModel",
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "gpt2-tiny": _GPT2_TINY,
        "gpt2-tiny-by-layer": {**_GPT2_TINY, "scale_attn_by_inverse_layer_idx": True},
        "gpt2": _GPT2,
        "gpt2-xl": {**_GPT2, "n_layer": 48, "n_embd": 1600, "n_head": 25},
    },
)
