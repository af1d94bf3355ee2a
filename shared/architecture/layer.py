"""One layer: a mixer, an MLP or MoE, norms, and the residual that joins them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shared.architecture.attention import Attention, GatedDeltaNet, LatentAttention
from shared.architecture.mlp import MLP, MoE
from shared.architecture.norm import Norm

Mixer = Attention | LatentAttention | GatedDeltaNet
# pre: before mixer and MLP. post: behind each, before the residual is added. sandwich: both. sum: behind each, of the
# sum with the residual (OPT-350M).
NormPlacement = Literal["pre", "post", "sandwich", "sum"]
# sequential: the MLP reads the mixer's result. parallel: both read the layer's input, each through a norm.
# parallel_shared: through one norm. normed: sequential, but the residual is the norm's output (GLM-130B).
ResidualKind = Literal["sequential", "normed", "parallel", "parallel_shared"]


@dataclass(frozen=True, kw_only=True)
class Residual:
    """`input_multiplier * x + multiplier * dropout(f(norm(x)))`, for f the mixer and the MLP."""

    kind: ResidualKind = "sequential"
    multiplier: float = 1.0  # Granite
    input_multiplier: float = 1.0  # DeepNorm
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A decoder layer. Equal layers are one shared value."""

    mixer: Mixer
    mlp: MLP | MoE
    norm: Norm
    norm_placement: NormPlacement = "pre"
    residual: Residual = field(default_factory=Residual)

    @property
    def pre_norms(self) -> bool:
        """Whether mixer and MLP each read a norm's output."""
        return self.norm_placement in ("pre", "sandwich")

    def parameter_count(self, hidden: int, *, active: bool = False) -> int:
        """Weights; `active`: of the experts that one token goes through."""
        norms = 1 if self.residual.kind == "parallel_shared" else 4 if self.norm_placement == "sandwich" else 2
        mlp = self.mlp
        ffn = mlp.parameter_count(hidden, active=active) if isinstance(mlp, MoE) else mlp.parameter_count(hidden)
        return norms * self.norm.parameter_count(hidden) + self.mixer.parameter_count(hidden) + ffn
