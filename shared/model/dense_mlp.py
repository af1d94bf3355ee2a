"""The dense MLP of a layer, and the activation of any MLP."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

from shared.kernels.glu import gated_linear_unit
from shared.model.fp8_linear import Fp8Linear, GateAndUp


def activated(states: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """fc1's output `[.., ffn]`, or `[.., 2 * ffn]` with a gate, to fc2's input `[.., ffn]`: as in Megatron-Core's MLP."""
    if not config.gated_linear_unit:
        plain: torch.Tensor = config.activation_func(states)
        return plain
    clamp, offset = config.activation_func_clamp_value, config.glu_linear_offset
    return gated_linear_unit(states, config.activation_func, clamp=clamp, offset=offset)


def is_swiglu(config: TransformerConfig) -> bool:
    """Whether `activated` is `silu(gate) * up`."""
    altered = config.activation_func_clamp_value is not None or config.glu_linear_offset
    return config.gated_linear_unit and config.activation_func is torch.nn.functional.silu and not altered


class DenseMLP(MLP):
    """Megatron-Core's MLP with `gated_linear_unit`: to the bit the same, with less to compute and to keep for backward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        other = (self.config.use_te_activation_func, self.config.bias_activation_fusion)
        assert not any(other), "not computed here"

    def forward(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[sequence, batch, hidden]` -> the same, and fc2's bias, which is not yet added. `padding_mask` is for MoE."""
        states, bias = self.linear_fc1(hidden_states)
        states = states if bias is None else states + bias
        fc2, config = self.linear_fc2, self.config
        fused = isinstance(fc2, Fp8Linear) and is_swiglu(config) and fc2.takes_gate_and_up(states)
        output: tuple[torch.Tensor, torch.Tensor | None]
        output = fc2(GateAndUp(states=states) if fused else activated(states, config))
        return output
