"""How rotary frequencies are stretched.

Pure data, importable without torch or Megatron-Core.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched past the length a model was first trained at.

    `linear` divides every position by `factor`; `llama3` (LLaMA 3.1) divides low frequencies only, with a smooth
    passage between the wavelengths `original_length / high_frequency_factor` and
    `original_length / low_frequency_factor`. `yarn` (Peng et al., 2023) does so by a ramp over the pairs, between
    those that turn `beta_fast` and `beta_slow` times in the original length, and enlarges sines and cosines.
    `longrope` (Ding et al., 2024) divides each pair's frequency by a factor of its own, of one list for sequences up to
    the original length and of another for longer ones, and enlarges sines and cosines for both. `dynamic` changes
    nothing of sequences up to the model's `max_position_embeddings`, and enlarges theta by the length of longer ones.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope", "dynamic"]
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192  # tokens

    beta_fast: float = 32.0  # turns; the rest is YaRN's too
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp starts and ends at whole pairs
    attention_factor: float | None = None  # of sines and cosines, longrope's too; None: by what else is given
    mscale: float | None = None
    mscale_all_dim: float | None = None  # DeepSeek multiplies scores by it as well

    short_factors: tuple[float, ...] = ()  # longrope's, one for each rotated pair
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.factor < 1.0:
            raise ValueError(f"rope scaling factor must be at least 1, not {self.factor}")
        yarn = (self.beta_fast, self.beta_slow, self.truncate, self.mscale, self.mscale_all_dim)
        if self.kind != "yarn" and yarn != (32.0, 1.0, True, None, None):
            raise ValueError(f"fields of yarn are set, but the rope scaling is {self.kind}")
        if self.kind not in ("yarn", "longrope") and self.attention_factor is not None:
            raise ValueError(f"an attention_factor is set, but the rope scaling is {self.kind}")
        if (self.kind == "longrope") != bool(self.short_factors) or len(self.short_factors) != len(self.long_factors):
            raise ValueError(
                f"{len(self.short_factors)} short and {len(self.long_factors)} long factors of {self.kind} are impossible"
            )

    @property
    def amplitude(self) -> float:
        """What sines and cosines are multiplied with, unless it is given.

        `0.1 ln(factor) + 1` for YaRN, `sqrt(1 + ln(factor) / ln(original_length))` for longrope.
        """
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            return sqrt(1.0 + log(self.factor) / log(self.original_length))
        if self.kind != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    def magnitude(self, mscale: float) -> float:
        """`0.1 mscale ln(factor) + 1`, DeepSeek's `yarn_get_mscale`."""
        return 0.1 * mscale * log(self.factor) + 1.0
