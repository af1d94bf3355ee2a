"""Fields of the decoders that are spelt as LLaMA's: `hidden_size`, `num_key_value_heads`, `rope_theta`..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.architecture.architecture import Activation, Architecture
from shared.families.common.fields import Fields, rope_fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.mapping.rule import Table

SILU: Mapping[str, Activation] = {"silu": "swiglu", "swish": "swiglu"}
GELU: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def common_fields(
    fields: Fields,
    *,
    default_theta: float = 10_000.0,
    epsilon: str = "rms_norm_eps",
    default_epsilon: float = 1e-6,
    activations: Mapping[str, Activation] = SILU,
    activation_field: str = "hidden_act",
    default_activation: str = "silu",
    rotary_fraction: float | None = None,
    rope_by_kind: bool = False,
    tied: bool = False,
    initializer_range: float = 0.02,
    dropout: bool = False,
) -> dict[str, Any]:
    """The fields of an Architecture that all of these families spell alike.

    Defaults are those of the transformers classes, for fields that their files may leave out; `rotary_fraction` is
    the default of `partial_rotary_factor` in families that have it, and `rope_by_kind` says that layers with a sliding
    window have rotary embedding of their own. Attention's dropout is refused unless zero, as in
    every released model of most families; those that release models with one say `dropout` and read it.
    """
    if not dropout:
        fields.expect("attention_dropout", 0, 0.0, why="train without dropout, or set it to 0.0")
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    positions = fields.get("max_position_embeddings", int)
    head_dim = fields.get("head_dim", int, hidden // heads)
    if rope_by_kind:
        theta, scaling, window_theta = fields.rope_by_kind(default_theta, positions)
    else:
        theta, scaling = fields.rope(default_theta, positions, partial=rotary_fraction is not None)
        window_theta = None
    return {
        "num_layers": fields.get("num_hidden_layers", int),
        "hidden_size": hidden,
        "ffn_hidden_size": fields.get("intermediate_size", int),
        "num_attention_heads": heads,
        "num_query_groups": fields.get("num_key_value_heads", int, heads),
        "head_dim": head_dim,
        "vocab_size": fields.get("vocab_size", int),
        "max_position_embeddings": positions,
        "norm_epsilon": fields.get(epsilon, float, default_epsilon),
        "activation": activation(fields, activation_field, activations, default_activation),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "window_rope_theta": window_theta,
        "rotary_dim": None if rotary_fraction is None else rotary_dim(fields, head_dim, rotary_fraction),
        "tied_embeddings": fields.get("tie_word_embeddings", bool, tied),
        "initializer_range": fields.get("initializer_range", float, initializer_range),
    }


def activation(fields: Fields, field: str, known: Mapping[str, Activation], default: str) -> Activation:
    """The architecture's name of the MLP's function."""
    fields.expect(field, *known, why=f"computed here: {', '.join(known)}")
    return known[fields.get(field, str, default)]


def gelu_name(a: Architecture) -> str:
    """Hugging Face's name of an MLP's function without a gate; ValueError for one with."""
    names = {GELU[name]: name for name in ("gelu", "gelu_pytorch_tanh", "relu")}
    if a.activation not in names:
        raise ValueError(f"its MLP's function is {a.activation}")
    return names[a.activation]


def rotary_dim(fields: Fields, head_dim: int, default: float, name: str = "partial_rotary_factor") -> int | None:
    """How many elements of each head are rotated, rounded down as transformers does; None for all."""
    rotated = int(head_dim * fields.rotary_fraction(default, name))
    return None if rotated == head_dim else rotated


def full_attention_only(fields: Fields, num_layers: int) -> None:
    """Qwen's sliding windows: present in the files, off in every released dense model."""
    fields.expect("use_sliding_window", False, why="sliding-window attention is not computed here")
    fields.expect("layer_types", ["full_attention"] * num_layers, why="only full attention is computed here")
    fields.ignore("sliding_window", "max_window_layers")  # without effect while use_sliding_window is false


def written_fields(
    a: Architecture,
    *,
    epsilon: str = "rms_norm_eps",
    activation_field: str = "hidden_act",
    activation: str = "silu",
    partial: bool = False,
) -> dict[str, Any]:
    """`common_fields` backwards."""
    return {
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.head_dim,
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_position_embeddings,
        activation_field: activation,
        epsilon: a.norm_epsilon,
        "tie_word_embeddings": a.tied_embeddings,
        "attention_dropout": a.attention_dropout,
        "initializer_range": a.initializer_range,
        **rope_fields(a.rope_theta, a.rope_scaling, a.rotated / a.head_dim if partial else None),
    }


def table(a: Architecture) -> Table:
    """Tensors under LLaMA's names."""
    return decoder_table(a, Names())
