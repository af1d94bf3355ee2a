"""Norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm or LayerNorm over the hidden size."""

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    epsilon: float
    bias: bool = False
    affine: bool = True  # False: no tensors; weight 1, bias 0
    zero_centered_gamma: bool = False  # the tensor holds weight - 1 (Gemma)

    def __post_init__(self) -> None:
        if self.epsilon < 0.0:
            raise ValueError(f"a norm with epsilon {self.epsilon} is impossible")

    def parameter_count(self, size: int) -> int:
        """Weights over `size` elements."""
        return size * (1 + self.bias) * self.affine
