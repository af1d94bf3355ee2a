"""Norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm or LayerNorm over the hidden size."""

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    epsilon: float
    bias: bool = False  # LayerNorm's
    affine: bool = True  # False: no tensors; weight 1, bias 0
    zero_centered_gamma: bool = False  # the tensor holds weight - 1 (Gemma)

    def __post_init__(self) -> None:
        if self.bias and self.kind != "layernorm":
            raise ValueError(f"{self.kind} has no bias")
        if self.zero_centered_gamma and self.kind != "rmsnorm":
            raise ValueError(f"{self.kind} with zero-centred gamma is impossible")

    def parameter_count(self, size: int) -> int:
        """Weights over `size` elements."""
        return size * (1 + self.bias) * self.affine
