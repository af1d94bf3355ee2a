"""Prefix LM (GLM): bidirectional attention in the prefix, causal behind it, blank infilling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PrefixLM:
    """A sequence is `[prefix with one mask token] [start_token, span that replaces the mask]` (Du et al., 2022).

    Mask: prefix tokens attend to the whole prefix; span tokens to the prefix and causally to the span.

    Position: index in the sequence for prefix tokens, index of the mask token for span tokens (with a mask token of
    `counted_tokens`: index in the sequence, too). Block position: 0 in the prefix; 1, 2.. in the span.
    """

    start_token: int  # <sop>
    blank_tokens: tuple[int, ...]  # [MASK], [sMASK], [gMASK]: the first that the sequence contains is the mask token
    counted_tokens: tuple[int, ...] = ()  # mask tokens whose span continues the positions of the prefix
    earliest: bool = False  # the mask token is the leftmost of any `blank_tokens` in the prefix
    # 2: 2-D positions. RoPE: half of each head by position, half by block position. Learned: sum of two tables.
    position_streams: Literal[1, 2] = 1
