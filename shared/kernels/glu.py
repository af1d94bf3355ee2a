"""Gated linear units (Shazeer, 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def gated_linear_unit(
    states: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    *,
    clamp: float | None = None,
    offset: float = 0.0,
) -> torch.Tensor:
    """`activation(gate) * (up + offset)`.

    Args:
        states: `[.., 2 * ffn]`: gate, then up.
        activation: of the gate.
        clamp: gate to <= clamp, up to [-clamp, clamp], before all else (gpt-oss).
        offset: added to up (gpt-oss: 1).

    Returns:
        `[.., ffn]`. With its gradient equal to the bit to Megatron-Core's `MLP.forward`, which adds an offset of 0 and
        concatenates the gradients of gate and up.
    """
    if activation is torch.nn.functional.silu and clamp is None and not offset:
        activated: torch.Tensor = _SwiGLU.apply(states)
        return activated
    gate, up = states.chunk(2, -1)
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(min=-clamp, max=clamp)
    return activation(gate) * (up + offset if offset else up)


class _SwiGLU(torch.autograd.Function):
    """Its backward writes both gradients where they belong."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
        gate, up = states.chunk(2, -1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(states, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        states, activated = ctx.saved_tensors
        gate, up = states.chunk(2, -1)
        out = torch.empty_like(states)
        swiglu_gradient(gate, up, activated, gradient, out)
        return out


def swiglu_gradient(
    gate: torch.Tensor, up: torch.Tensor, activated: torch.Tensor, gradient: torch.Tensor, out: torch.Tensor
) -> None:
    """Write the gradients of gate and up, in this order, into `out` `[.., 2 * ffn]`; `activated`: `silu(gate)`."""
    of_gate, of_up = out.chunk(2, -1)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
    torch.mul(gradient, activated, out=of_up)
