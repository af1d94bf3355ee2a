"""What an FP8 linear layer reads, where it is computed as it is quantised: SwiGLU of fc1's output, a norm of any matrix.

A source stands for a bf16 matrix that is never written. Its elements are rounded where the modules round that it stands for,
`shared.kernels.glu` and `shared.model.norm`: codes are the same bytes with it and without.

Letters: T tokens, K features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Gated:
    """`silu(gate) * up` (Shazeer, 2020).

    Attributes:
        gate: `[T, K]`, of any strides.
        up: `[T, K]`.
    """

    gate: torch.Tensor
    up: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.gate.shape

    @property
    def device(self) -> torch.device:
        return self.gate.device

    @property
    def dtype(self) -> torch.dtype:
        return self.gate.dtype

    def __len__(self) -> int:
        return len(self.gate)

    def t(self) -> Gated:
        return Gated(gate=self.gate.t(), up=self.up.t())

    def dense(self) -> torch.Tensor:
        """The matrix, by torch's operations."""
        return functional.silu(self.gate) * self.up


@dataclass(frozen=True, kw_only=True)
class Normed:
    """`weight * x / rms(x)` (Zhang and Sennrich, 2019), downcast before the weight; zero-centred: `(1 + weight) * x / rms(x)`.

    Attributes:
        x: `[T, K]`, of any strides.
        inverse: `1 / rms(x)`, fp32 `[T, 1]`.
        weight: `[1, K]`.
        epsilon: added to the mean square.
        zero_centered: Gemma's, with one downcast.
    """

    x: torch.Tensor
    inverse: torch.Tensor
    weight: torch.Tensor
    epsilon: float
    zero_centered: bool

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def __len__(self) -> int:
        return len(self.x)

    def t(self) -> Normed:
        return replace(self, x=self.x.t(), inverse=self.inverse.t(), weight=self.weight.t())

    def dense(self) -> torch.Tensor:
        """The matrix, by torch's operations."""
        scaled = self.x.float() * self.inverse
        if self.zero_centered:
            return (scaled * (1.0 + self.weight.float())).to(self.x.dtype)
        return self.weight * scaled.to(self.x.dtype)


type Source = torch.Tensor | Gated | Normed


def dense(source: Source) -> torch.Tensor:
    """The matrix that a source stands for."""
    return source if isinstance(source, torch.Tensor) else source.dense()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, zero_centered: bool) -> torch.Tensor:
    """What `Normed` stands for, with a gradient: `shared.model.norm`'s RMSNorm and ZeroCenteredRMSNorm."""
    scaled = functional.rms_norm(x.float(), (x.shape[-1],), eps=epsilon)
    if zero_centered:
        return (scaled * (1.0 + weight.float())).to(x.dtype)
    return weight * scaled.to(x.dtype)
