"""Names of the attention back ends, in order of preference: `choose` explains them. Standard library only."""

from __future__ import annotations

from typing import Literal

AttentionBackend = Literal["flash-attn-3", "sdpa", "flash-attn-2", "varlen", "te", "segments", "eager"]
