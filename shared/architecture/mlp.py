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
            raise ValueError(f"clamp and up_offset need a gated activation, not {self.activation}")

    @property
    def gated(self) -> bool:
        """Whether the MLP is gated (GLU)."""
        return self.activation in GATED

    @property
    def fc1_size(self) -> int:
        """Rows of fc1: `[gate ; up]`, or up alone."""
        return self.ffn_hidden_size * (1 + self.gated)

    def parameter_count(self, hidden: int) -> int:
        """Number of parameters."""
        return hidden * (self.fc1_size + self.ffn_hidden_size) + self.bias * (self.fc1_size + hidden)


@dataclass(frozen=True, kw_only=True)
class MoE:
    """Mixture of experts with top-k routing.

    scores `[tokens, experts]` = softmax or sigmoid of the router logits. Weights of the top_k experts: their scores,
    divided by the sum of these if `normalized` (norm_topk_prob), times `scaling` (routed_scaling_factor).
    """

    experts: int
    top_k: int
    expert: MLP
    shared: MLP | None = None  # all shared experts, as one MLP
    shared_gate: bool = False  # shared output * sigmoid(shared_expert_gate(x)) (Qwen 1.5 and 2)
    router_bias: bool = False  # gpt-oss
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    scaling: float = 1.0
    correction_bias: bool = False  # fp32 e_score_correction_bias: added for top-k selection only (DeepSeek V3)
    groups: int = 1  # n_group: group-limited routing
    top_groups: int = 1  # topk_group
    group_score_top: int = 2  # group score: sum of its group_score_top highest scores
    auxiliary_loss: float = 0.0  # coefficient of the load-balancing loss
    auxiliary_loss_over: Literal["batch", "sequence"] = "batch"  # tokens over which the load is balanced

    def __post_init__(self) -> None:
        if not 0 < self.top_k <= self.experts:
            raise ValueError(f"top_k {self.top_k} must be in 1..{self.experts}, the number of experts")
        if self.experts % self.groups or not 0 < self.top_groups <= self.groups:
            raise ValueError(
                f"{self.groups} expert groups must divide {self.experts} experts, and top_groups {self.top_groups} must be "
                f"in 1..{self.groups}"
            )
        if not 0 < self.group_score_top <= self.experts // self.groups:
            raise ValueError(
                f"group_score_top {self.group_score_top} must be in 1..{self.experts // self.groups}, the experts per group"
            )
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate is set without shared experts")

    def parameter_count(self, hidden: int, *, active: bool = False) -> int:
        """Number of parameters of router and experts; `active`: top_k experts only."""
        count = (self.top_k if active else self.experts) * self.expert.parameter_count(hidden)
        count += self.experts * (hidden + self.router_bias + self.correction_bias) + self.shared_gate * hidden
        return count + (self.shared.parameter_count(hidden) if self.shared else 0)
