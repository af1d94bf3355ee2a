"""RoPE scaling (`rope_scaling` of config.json).

Pure data, importable without torch or Megatron-Core.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """RoPE scaling by kind; cos and sin are multiplied by `concentration_factor`.

    - `linear`: inv_freq / factor.
    - `llama3` (LLaMA 3.1): wavelengths below original_length / high_frequency_factor are kept, above
      original_length / low_frequency_factor divided by factor, interpolated between.
    - `yarn` (Peng et al., 2023): pairs with more than `beta_fast` rotations in original_length are kept, with fewer
      than `beta_slow` divided by factor, linear ramp over the pairs between.
    - `longrope` (Ding et al., 2024): inv_freq[i] / short_factors[i] up to original_length, / long_factors[i] beyond.
    - `dynamic` (NTK): unscaled up to max_position_embeddings; beyond, theta grows with the sequence length.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope", "dynamic"]
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192  # tokens

    beta_fast: float = 32.0  # yarn: rotations in original_length
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: round the ends of the ramp to whole pairs
    attention_factor: float | None = None  # yarn, longrope: overrides the formula of `concentration_factor`
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn; DeepSeek multiplies the softmax scale by its square, too

    short_factors: tuple[float, ...] = ()  # longrope: one per rotated pair
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.factor < 1.0:
            raise ValueError(f"rope_scaling factor {self.factor} must be at least 1")
        yarn = (self.beta_fast, self.beta_slow, self.truncate, self.mscale, self.mscale_all_dim)
        if self.kind != "yarn" and yarn != (32.0, 1.0, True, None, None):
            raise ValueError(f"yarn fields are set, but the rope_scaling type is {self.kind}")
        if self.kind not in ("yarn", "longrope") and self.attention_factor is not None:
            raise ValueError(f"attention_factor is set, but the rope_scaling type is {self.kind}")
        if (self.kind == "longrope") != bool(self.short_factors) or len(self.short_factors) != len(self.long_factors):
            raise ValueError(
                f"rope_scaling of type {self.kind} has {len(self.short_factors)} short and {len(self.long_factors)} long "
                "factors; longrope needs equally many, other types none"
            )

    @property
    def concentration_factor(self) -> float:
        """Multiplier of cos and sin: `attention_factor` in transformers, `concentration_factor` in Megatron-Core.

        YaRN: `0.1 ln(factor) + 1`, or with mscale `yarn_mscale(mscale) / yarn_mscale(mscale_all_dim)`.
        longrope: `sqrt(1 + ln(factor) / ln(original_length))`.
        """
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            return sqrt(1.0 + log(self.factor) / log(self.original_length))
        if self.kind != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return self.yarn_mscale(self.mscale) / self.yarn_mscale(self.mscale_all_dim)
        return self.yarn_mscale(1.0)

    def yarn_mscale(self, mscale: float) -> float:
        """`0.1 mscale ln(factor) + 1`, DeepSeek's `yarn_get_mscale`."""
        return 0.1 * mscale * log(self.factor) + 1.0
