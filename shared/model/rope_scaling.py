"""How rotary frequencies are stretched.

Pure data, importable without torch or Megatron-Core.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched past the length a model was first trained at.

    `linear` divides every position by `factor`; `llama3` (LLaMA 3.1) divides low frequencies only, with a smooth
    passage between the wavelengths `original_length / high_frequency_factor` and
    `original_length / low_frequency_factor`. `yarn` (Peng et al., 2023) does so by a ramp over the pairs, between
    those that turn `beta_fast` and `beta_slow` times in the original length, and enlarges sines and cosines.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192  # tokens

    beta_fast: float = 32.0  # turns; the rest is YaRN's too
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp starts and ends at whole pairs
    attention_factor: float | None = None  # of sines and cosines; None: by the factor and the two below
    mscale: float | None = None
    mscale_all_dim: float | None = None  # DeepSeek multiplies scores by it as well

    def __post_init__(self) -> None:
        if self.factor < 1.0:
            raise ValueError(f"rope scaling factor must be at least 1, not {self.factor}")
        plain = (32.0, 1.0, True, None, None, None)
        yarn = (self.beta_fast, self.beta_slow, self.truncate, self.attention_factor, self.mscale, self.mscale_all_dim)
        if self.kind != "yarn" and yarn != plain:
            raise ValueError(f"fields of yarn are set, but the rope scaling is {self.kind}")

    @property
    def amplitude(self) -> float:
        """What sines and cosines are multiplied with: `0.1 ln(factor) + 1` unless given otherwise, for YaRN."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    def magnitude(self, mscale: float) -> float:
        """`0.1 mscale ln(factor) + 1`, DeepSeek's `yarn_get_mscale`."""
        return 0.1 * mscale * log(self.factor) + 1.0
