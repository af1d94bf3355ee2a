"""Both ends of a model: embedding and positions before the first layer, norm and output layer behind the last."""

from __future__ import annotations

from dataclasses import dataclass

from shared.architecture.norm import Norm


@dataclass(frozen=True, kw_only=True)
class LearnedPositions:
    """A table of learned positions, added to the embedded tokens."""

    offset: int = 0  # rows before position 0 (OPT)


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """`dropout(multiplier * norm(table[token]) + positions)`."""

    factorised_size: int | None = None  # columns of table and output layer, projected to and from the hidden size
    multiplier: float = 1.0
    norm: Norm | None = None  # BLOOM
    positions: LearnedPositions | None = None
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Head:
    """`softcap(multiplier * output_layer(norm(x)))`."""

    tied: bool  # the output layer is the embedding's table
    norm: Norm | None  # behind the last layer
    bias: bool = False
    normalized: bool = False  # rows of the output layer are divided by their length (Baichuan 2's NormHead)
    multiplier: float = 1.0
    softcap: float | None = None  # logits l -> cap * tanh(l / cap)
