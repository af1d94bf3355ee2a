"""RMSNorm and LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm or LayerNorm over the hidden size."""

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    epsilon: float
    bias: bool = False
    affine: bool = True  # elementwise_affine; False: no weight, no bias
    zero_centered_gamma: bool = False  # stored weight = gamma - 1 (Gemma)

    def __post_init__(self) -> None:
        if self.epsilon < 0.0:
            raise ValueError(f"norm epsilon {self.epsilon} must not be negative")

    def parameter_count(self, size: int) -> int:
        """Number of parameters of a norm over `size` elements."""
        return size * (1 + self.bias) * self.affine
