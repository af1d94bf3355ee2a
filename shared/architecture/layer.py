"""Decoder layer: mixer, MLP or MoE, norms, residual."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shared.architecture.attention import Attention, GatedDeltaNet, LatentAttention
from shared.architecture.mlp import MLP, MoE
from shared.architecture.norm import Norm

Mixer = Attention | LatentAttention | GatedDeltaNet
# For f the mixer and the MLP. pre: x + f(norm(x)). post: x + norm(f(x)). sandwich: x + norm'(f(norm(x))).
# sum: norm(x + f(x)) (OPT-350M).
NormPlacement = Literal["pre", "post", "sandwich", "sum"]
# sequential: h = x + mixer(norm(x)), h + mlp(norm'(h)). parallel: x + mixer(norm(x)) + mlp(norm'(x)).
# parallel_shared: parallel with norm' = norm. normed: sequential with the norm's output as residual (GLM-130B).
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
    """A decoder layer. Equal layers of a model are one object."""

    mixer: Mixer
    mlp: MLP | MoE
    norm: Norm
    norm_placement: NormPlacement = "pre"
    residual: Residual = field(default_factory=Residual)

    @property
    def pre_norms(self) -> bool:
        """Whether mixer and MLP have a norm on their input."""
        return self.norm_placement in ("pre", "sandwich")

    def parameter_count(self, hidden: int, *, active: bool = False) -> int:
        """Number of parameters; `active`: top_k experts only."""
        norms = 1 if self.residual.kind == "parallel_shared" else 4 if self.norm_placement == "sandwich" else 2
        mlp = self.mlp
        ffn = mlp.parameter_count(hidden, active=active) if isinstance(mlp, MoE) else mlp.parameter_count(hidden)
        return norms * self.norm.parameter_count(hidden) + self.mixer.parameter_count(hidden) + ffn
