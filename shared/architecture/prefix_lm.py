"""Prefix LM: a text with a blank, and what fills it (GLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PrefixLM:
    """A row is a prefix with a blank, then its filling from `start_token` on (Du et al., 2022).

    Prefix tokens attend to each other in both directions, filling tokens to the prefix and causally to each other.

    The blank is at the first of `blank_tokens` that the row has, or with `earliest` at the first place in the prefix of
    any of them. First position: a prefix token's index; for a filling token the blank's index. Second position: 0 in
    the prefix; in the filling its index from 1. Behind a blank of `counted_tokens` the first position counts on.
    """

    start_token: int
    blank_tokens: tuple[int, ...]
    counted_tokens: tuple[int, ...] = ()
    earliest: bool = False
    # 2: 2-D positions. Rotary: half of each head by each position. Learned: a table of each, added.
    position_streams: Literal[1, 2] = 1
