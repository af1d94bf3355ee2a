"""Baichuan 1 and 2: LLaMA with queries, keys and values as blocks of one projection; the 13B with ALiBi."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.errors import UserError
from shared.families.common.decoder import SILU, activation
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(qkv=("self_attn.W_pack",))
_SECOND_VOCABULARY = 125_696  # of Baichuan 2, as published
_HIDDEN_SIZES = {4096: True, 5120: False}  # as published: whether such a model has rotary embedding


def read(fields: Fields) -> Architecture:
    """Which of the four published programs a configuration is for is told by the fields that only some of them have.

    The 7B's class has `max_position_embeddings`, and rotary embedding with a fixed base; the 13B's has
    `model_max_length` alone, and ALiBi. Baichuan 2's have `z_loss_weight`, though the published 13B leaves it out, and
    a normalised head.
    """
    fields.expect("z_loss_weight", 0, 0.0, why="the loss is cross entropy alone; set it to 0")
    fields.expect("rope_theta", 10_000, why="Baichuan's rotary base is 10000, whatever this says")
    fields.ignore("model_max_length", "gradient_checkpointing")
    hidden, heads, vocabulary = (fields.get(n, int) for n in ("hidden_size", "num_attention_heads", "vocab_size"))
    fields.expect("num_key_value_heads", heads, why="every head has its own keys and values")
    rotary = fields.has("max_position_embeddings")
    if hidden in _HIDDEN_SIZES and rotary != _HIDDEN_SIZES[hidden]:
        raise UserError(
            f"config.json: {'remove' if rotary else 'give'} max_position_embeddings: that the field is there stands for "
            f"rotary embedding, and Baichuan's models of hidden_size {hidden} have {'ALiBi' if rotary else 'it'}"
        )
    return nested(
        family="baichuan",
        num_layers=fields.get("num_hidden_layers", int),
        hidden_size=hidden,
        ffn_hidden_size=fields.get("intermediate_size", int),
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        max_position_embeddings=fields.get("max_position_embeddings" if rotary else "model_max_length", int),
        norm_epsilon=fields.get("rms_norm_eps", float, 1e-6),
        activation=activation(fields, "hidden_act", SILU, "silu"),
        positions="rope" if rotary else "alibi",
        tied_embeddings=fields.get("tie_word_embeddings", bool, False),
        normalized_head=fields.has("z_loss_weight") or vocabulary >= _SECOND_VOCABULARY,
        initializer_range=fields.get("initializer_range", float, 0.02),
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "vocab_size": a.vocab_size,
        "model_max_length": a.max_position_embeddings,
        **({"max_position_embeddings": a.max_position_embeddings} if a.positions == "rope" else {}),
        "rms_norm_eps": a.norm_epsilon,
        "hidden_act": "silu",
        "tie_word_embeddings": a.tied_embeddings,
        "initializer_range": a.initializer_range,
        **({"z_loss_weight": 0} if a.normalized_head else {}),
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_BAICHUAN_7B = nested(
    family="baichuan",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11_008,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=128,
    vocab_size=64_000,
    max_position_embeddings=4096,
    norm_epsilon=1e-6,
    tied_embeddings=False,
)
_BAICHUAN_13B = replace(
    _BAICHUAN_7B,
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=13_696,
    num_attention_heads=40,
    num_query_groups=40,
    positions="alibi",
)
_SECOND: dict[str, Any] = {"vocab_size": _SECOND_VOCABULARY, "normalized_head": True}

FAMILY = Family(
    name="baichuan",
    title="Baichuan 7B, 13B, Baichuan 2",
    hf_class="BaichuanForCausalLM",
    other_classes=("BaiChuanForCausalLM",),  # Baichuan-7B
    remote=True,
    read=read,
    table=table,
    write=write,
    sizes={
        "baichuan-tiny": tiny(_BAICHUAN_7B, num_query_groups=4),
        "baichuan2-tiny": tiny(_BAICHUAN_7B, num_query_groups=4, normalized_head=True),
        # heads that are no power of two have two series of ALiBi slopes
        "baichuan2-tiny-6-heads": tiny(
            _BAICHUAN_13B, hidden_size=96, num_attention_heads=6, num_query_groups=6, normalized_head=True
        ),
        "baichuan-7b": _BAICHUAN_7B,
        "baichuan-13b": _BAICHUAN_13B,
        "baichuan2-7b": replace(_BAICHUAN_7B, **_SECOND),
        "baichuan2-13b": replace(_BAICHUAN_13B, **_SECOND),
    },
)
