"""FP8 linear layers of SwiGLU and of a norm, whose output is quantised as it is computed: it is never written in bf16.

Passes over memory on a GPU (`docs/fp8.md` counts their bytes, `bench_fp8_gpu.py` times both):

    SwiGLU      apart: silu, times up, amax, codes both ways     together: (amax,) codes both ways, each from gate and up
    RMSNorm     apart: fp32, norm, bf16, times weight, amax, ..  together: mean square, (amax,) codes both ways

The pass for amax, in brackets, is that of recipes whose scale is not known beforehand: tensorwise, and rowwise by row and by
column. It computes the source once more, which costs less than to write it. Delayed and blockwise need none.

Kept for the backward pass is what the source reads, in bf16, and the codes: no output of SiLU, no fp32 copy of a norm's input.
The gradient of the source is one kernel. It is not quantised there: the layer in front does so, after autograd handed it over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from shared.kernels.fp8 import torch_coder
from shared.kernels.fp8.fused_source import Gated, Normed, rms_norm
from shared.kernels.fp8.matmul import Shards, backward_pass, forward_pass
from shared.kernels.fp8.quantize import coder
from shared.kernels.fp8.tensor_state import LinearState
from shared.kernels.glu import gated_linear_unit


def fuses(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether fused layers save anything: bf16 on a GPU with Triton. By torch's operations a pass is a pass."""
    return dtype == torch.bfloat16 and coder(device) is not torch_coder


def fp8_gated_linear(states: torch.Tensor, weight: torch.Tensor, state: LinearState, shards: Shards) -> torch.Tensor:
    """`(silu(gate) * up) W^T` with gradients: `fp8_linear` of `gated_linear_unit`, with the same codes.

    Args:
        states: `[..., 2 K]`: gate, then up.
        weight, state, shards: as for `fp8_linear`.

    Returns:
        `[..., N]`.
    """
    if state.in_bf16:
        return functional.linear(gated_linear_unit(states, functional.silu), weight)
    flat = states.reshape(-1, states.shape[-1])
    y: torch.Tensor = _GatedLinear.apply(flat, weight, state, shards, torch.is_grad_enabled())
    return y.view(*states.shape[:-1], len(weight))


def fp8_normed_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    state: LinearState,
    shards: Shards,
    *,
    epsilon: float,
    zero_centered: bool,
) -> torch.Tensor:
    """`norm(x) W^T` with gradients: `fp8_linear` of `rms_norm`, with the same codes from the same mean squares.

    On a GPU the mean squares are sums in another order than torch's.

    Args:
        x: `[..., K]`.
        norm_weight: `[K]`.
        weight: `[N, K]`.
        state: of the layer.
        shards: of the layer.
        epsilon: of the norm.
        zero_centered: the norm multiplies by `1 + norm_weight`.

    Returns:
        `[..., N]`.
    """
    if state.in_bf16:
        return functional.linear(rms_norm(x, norm_weight, epsilon, zero_centered=zero_centered), weight)
    flat = x.reshape(-1, x.shape[-1])
    norm = epsilon, zero_centered
    y: torch.Tensor = _NormedLinear.apply(flat, norm_weight, weight, norm, state, shards, torch.is_grad_enabled())
    return y.view(*x.shape[:-1], len(weight))


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, state: LinearState, shards: Shards, training: bool
    ) -> torch.Tensor:
        ctx.state, ctx.shards = state, shards
        y, kept = forward_pass(_gated(states), weight, state, shards, training=training, keeps=ctx.needs_input_grad[1])
        if training:
            ctx.save_for_backward(states, weight, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight, *kept = ctx.saved_tensors
        dtype = states.dtype if ctx.needs_input_grad[0] else None
        of_source, of_weight = backward_pass(gradients[0], weight, kept, ctx.state, ctx.shards, dtype)
        of_states = None
        if of_source is not None:
            of_states = coder(states.device).gated_gradient(_gated(states), of_source)
        return of_states, of_weight, None, None, None


def _gated(states: torch.Tensor) -> Gated:
    gate, up = states.chunk(2, 1)
    return Gated(gate=gate, up=up)


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        weight: torch.Tensor,
        norm: tuple[float, bool],
        state: LinearState,
        shards: Shards,
        training: bool,
    ) -> torch.Tensor:
        ctx.norm, ctx.state, ctx.shards = norm, state, shards
        inverse = coder(x.device).inverse_rms(x, norm[0])
        source = _normed(x, inverse, norm_weight, norm)
        y, kept = forward_pass(source, weight, state, shards, training=training, keeps=ctx.needs_input_grad[2])
        if training:
            ctx.save_for_backward(x, inverse, norm_weight, weight, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inverse, norm_weight, weight, *kept = ctx.saved_tensors
        wanted = any(ctx.needs_input_grad[:2])
        of_source, of_weight = backward_pass(
            gradients[0], weight, kept, ctx.state, ctx.shards, x.dtype if wanted else None
        )
        of_x = of_norm = None
        if of_source is not None:
            source = _normed(x, inverse, norm_weight, ctx.norm)
            of_x, of_norm = coder(x.device).normed_gradient(source, of_source)
        return of_x, of_norm, of_weight, None, None, None, None


def _normed(x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, norm: tuple[float, bool]) -> Normed:
    epsilon, zero_centered = norm
    return Normed(x=x, inverse=inverse, weight=weight[None], epsilon=epsilon, zero_centered=zero_centered)
