"""config.json fields with GPT-2's names: `n_embd`, `n_head`, `n_layer`, `attn_pdrop`..."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import GELU, Decoder, Spelling, read_decoder, write_decoder
from shared.families.common.fields import Fields

GPT = Spelling(
    layers="n_layer",
    hidden="n_embd",
    ffn="n_inner",
    heads="n_head",
    groups=None,
    head_dim=None,
    positions="n_positions",
    epsilon="layer_norm_epsilon",
    activation="activation_function",
    attention_dropout="attn_pdrop",
    hidden_dropout="resid_pdrop",
    embedding_dropout="embd_pdrop",
)


def read_gpt(fields: Fields, *, dropout: float, default_activation: str, tied: bool) -> Decoder:
    """The common fields; `dropout`: the class default of attention, hidden and embedding dropout."""
    fields.expect("scale_attn_weights", True, why="the softmax scale must be 1 / sqrt(head_dim)")
    # Fields of classification heads, and of other runtimes.
    fields.ignore("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type")
    fields.ignore("summary_use_proj", "gradient_checkpointing", "n_ctx")
    decoder = read_decoder(
        fields,
        GPT,
        rotary=False,
        ffn_ratio=4,
        default_epsilon=1e-5,
        activations=GELU,
        default_activation=default_activation,
        tied=tied,
        dropout=dropout,
    )
    return replace(decoder, norm={**decoder.norm, "kind": "layernorm", "bias": True}, mlp={**decoder.mlp, "bias": True})


def write_gpt(a: Architecture) -> dict[str, Any]:
    """Inverse of `read_gpt`."""
    return write_decoder(a, GPT, rotary=False)
