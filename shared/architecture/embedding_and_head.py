"""Embedding (with learned positions) and head (final norm and output layer)."""

from __future__ import annotations

from dataclasses import dataclass

from shared.architecture.norm import Norm


@dataclass(frozen=True, kw_only=True)
class LearnedPositions:
    """Learned absolute position embedding."""

    offset: int = 0  # rows before position 0 (OPT)


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """`dropout(multiplier * norm(table[token]) + positions)`."""

    factorised_size: int | None = None  # factorised embedding: columns of table and output layer (OPT-350M)
    multiplier: float = 1.0
    norm: Norm | None = None  # BLOOM
    positions: LearnedPositions | None = None
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Head:
    """`softcap(multiplier * output_layer(norm(x)))`."""

    tied: bool  # tied embeddings: the output layer's weight is the embedding table
    norm: Norm | None  # final norm
    bias: bool = False
    normalized: bool = False  # NormHead: each row of the output layer's weight divided by its L2 norm (Baichuan 2)
    multiplier: float = 1.0
    softcap: float | None = None  # logits l -> cap * tanh(l / cap)
