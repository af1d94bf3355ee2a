"""MLP and mixture of experts (MoE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["swiglu", "geglu", "geglu_tanh", "quick_geglu", "gelu", "gelu_tanh", "relu"]
GATED: frozenset[Activation] = frozenset(("swiglu", "geglu", "geglu_tanh", "quick_geglu"))


@dataclass(frozen=True, kw_only=True)
class MLP:
    """`down(act(gate) * up)`, or `down(act(up))` without a gate."""

    ffn_hidden_size: int
    activation: Activation = "swiglu"  # quick_geglu: gate * sigmoid(1.702 gate)
    bias: bool = False
    clamp: float | None = None  # clamp gate to <= clamp, up to [-clamp, clamp] (gpt-oss swiglu_limit)
    up_offset: float = 0.0  # act(gate) * (up + up_offset)

    def __post_init__(self) -> None:
        if (self.clamp is not None or self.up_offset) and not self.gated:
            raise ValueError(f"clamp or offset of a gate with {self.activation}, which has none")

    @property
    def gated(self) -> bool:
        """Whether an activated projection multiplies a second one."""
        return self.activation in GATED

    @property
    def fc1_size(self) -> int:
        """Rows of fc1: `[gate ; up]`, or up alone."""
        return self.ffn_hidden_size * (1 + self.gated)

    def parameter_count(self, hidden: int) -> int:
        """Weights."""
        return hidden * (self.fc1_size + self.ffn_hidden_size) + self.bias * (self.fc1_size + hidden)


@dataclass(frozen=True, kw_only=True)
class MoE:
    """A mixture of experts: every token goes through the `top_k` that its router scores highest.

    Router logits `[tokens, experts]` become scores by softmax over all experts or a sigmoid each. The chosen experts'
    scores, divided by their sum if `normalized`, times `scaling`, weight their outputs.
    """

    experts: int
    top_k: int
    expert: MLP
    shared: MLP | None = None  # shared experts together, as one MLP
    shared_gate: bool = False  # their output times the sigmoid of a projection of the token (Qwen 1.5 and 2)
    router_bias: bool = False  # gpt-oss
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    scaling: float = 1.0
    correction_bias: bool = False  # fp32, added to the scores for choosing only (DeepSeek V3)
    groups: int = 1  # equal runs of experts; a token goes to the best `top_groups` only
    top_groups: int = 1
    group_score_top: int = 2  # a group's score: the sum of as many of its best scores
    auxiliary_loss: float = 0.0  # weight of the load-balancing loss
    auxiliary_loss_over: Literal["batch", "sequence"] = "batch"  # tokens over which the load is balanced

    def __post_init__(self) -> None:
        if not 0 < self.top_k <= self.experts:
            raise ValueError(f"top {self.top_k} of {self.experts} experts is impossible")
        if self.experts % self.groups or not 0 < self.top_groups <= self.groups:
            raise ValueError(f"top {self.top_groups} of {self.groups} groups of {self.experts} experts is impossible")
        if not 0 < self.group_score_top <= self.experts // self.groups:
            raise ValueError(
                f"the {self.group_score_top} best scores of a group of {self.experts // self.groups} experts are impossible"
            )
        if self.shared_gate and self.shared is None:
            raise ValueError("a gate of shared experts is set, but there are none")

    def parameter_count(self, hidden: int, *, active: bool = False) -> int:
        """Weights of router and experts; `active`: of the experts that one token goes through."""
        count = (self.top_k if active else self.experts) * self.expert.parameter_count(hidden)
        count += self.experts * (hidden + self.router_bias + self.correction_bias) + self.shared_gate * hidden
        return count + (self.shared.parameter_count(hidden) if self.shared else 0)
