"""Baichuan 1 and 2: LLaMA with fused QKV `[q ; k ; v]`; 13B: ALiBi; Baichuan 2: NormHead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shared.architecture.architecture import Alibi, Architecture, Rotary
from shared.errors import UserError
from shared.families.common.decoder import Spelling, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import Family

_NAMES = Names(qkv=("self_attn.W_pack",))
_SECOND_VOCABULARY = 125_696  # of Baichuan 2, as published
_HIDDEN_SIZES = {4096: True, 5120: False}  # hidden_size of the published models -> whether it has RoPE

_SPELLING = Spelling(positions="model_max_length", groups=None, head_dim=None, attention_dropout=None)


def read(fields: Fields) -> Architecture:
    """The four published classes share one model_type and are told apart by their fields.

    7B: `max_position_embeddings`, RoPE with theta 10000. 13B: `model_max_length` only, ALiBi. Baichuan 2: NormHead,
    recognised by `z_loss_weight` or by the vocabulary (the published Baichuan2-13B has no z_loss_weight).
    """
    fields.expect("z_loss_weight", 0, 0.0, why="the loss is cross entropy alone; set it to 0")
    fields.expect("rope_theta", 10_000, why="the published class always uses 10000")
    fields.ignore("model_max_length", "gradient_checkpointing")
    rotary = fields.has("max_position_embeddings")
    spelling = replace(_SPELLING, positions="max_position_embeddings") if rotary else _SPELLING
    hidden = fields.get("hidden_size", int)
    if hidden in _HIDDEN_SIZES and rotary != _HIDDEN_SIZES[hidden]:
        raise UserError(
            f"config.json: {'remove' if rotary else 'add'} max_position_embeddings: it stands for RoPE, and Baichuan models "
            f"of hidden_size {hidden} have {'ALiBi' if rotary else 'RoPE'}"
        )
    decoder = read_decoder(fields, spelling, rotary=False)
    fields.expect("num_key_value_heads", decoder.heads, why="this family has MHA: as many as num_attention_heads")
    normalized = fields.has("z_loss_weight") or decoder.vocab_size >= _SECOND_VOCABULARY
    return decoder.build(
        "baichuan", attention={"rotary": Rotary()} if rotary else {"alibi": Alibi()}, head={"normalized": normalized}
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a, _SPELLING, rotary=False),
        **({"max_position_embeddings": a.max_position_embeddings} if a.attention.rotary else {}),
        **({"z_loss_weight": 0} if a.head.normalized else {}),
    }


_BAICHUAN_13B = {
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "intermediate_size": 13_696,
    "num_attention_heads": 40,
    "vocab_size": 64_000,
    "model_max_length": 4096,
}
_BAICHUAN_7B = {
    **_BAICHUAN_13B,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
_BAICHUAN_TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}

FAMILY = Family(
    name="baichuan",
    title="Baichuan 7B, 13B, Baichuan 2",
    hf_class="BaichuanForCausalLM",
    other_classes=("BaiChuanForCausalLM",),  # Baichuan-7B
    remote=True,
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "baichuan-tiny": _BAICHUAN_TINY,
        "baichuan2-tiny": {**_BAICHUAN_TINY, "z_loss_weight": 0},
        # not a power of two: two series of ALiBi slopes
        "baichuan2-tiny-6-heads": {
            **_BAICHUAN_13B,
            "num_hidden_layers": 2,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_attention_heads": 6,
            "vocab_size": 512,
            "model_max_length": 512,
            "z_loss_weight": 0,
        },
        "baichuan-7b": _BAICHUAN_7B,
        "baichuan-13b": _BAICHUAN_13B,
        "baichuan2-7b": {**_BAICHUAN_7B, "vocab_size": 125_696},
        "baichuan2-13b": {**_BAICHUAN_13B, "vocab_size": 125_696},
    },
)
