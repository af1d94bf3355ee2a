"""Attention sinks (gpt-oss) over any flash kernel that returns the log-sum-exp of its scores and takes one back.

With `lse` of a query's scores, `lse' = log(exp(lse) + exp(sink))` and `out' = out exp(lse - lse') = out sigmoid(lse - sink)`.
A flash kernel's backward pass makes its weights as `exp(score - lse)` and its scores' gradient as
`weights (dout v - rowsum(dout out))`: given `lse'` and `out'` it returns the gradients of q, k and v with sinks. The sink's own
is `-sum(exp(sink - lse') rowsum(dout out'))`. Shapes: as in `variable_length`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from shared.kernels.attention.variable_length import Packed

type Gradients = tuple[Tensor, Tensor, Tensor]


class Kernel(Protocol):
    """The two passes of a flash kernel, with everything but q, k and v bound."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`out` `[T, H, W]` and `lse` `[H, T]` fp32."""
        ...

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Gradients of q, k and v from that of `out`."""
        ...


def attend(packed: Packed, sinks_H: Tensor, kernel: Kernel) -> Tensor:
    """Attention with sinks, `[T, H, W]`, differentiable in q, k, v and the sinks."""
    out: Tensor = _Sinks.apply(packed.q_THW, packed.k_TGW, packed.v_TGW, sinks_H, kernel)
    return out


class _Sinks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, kernel: Kernel) -> Tensor:
        out, lse_HT = kernel.forward(q, k, v)
        sinks_H1 = sinks_H.to(lse_HT.dtype)[:, None]
        share_HT = torch.sigmoid(lse_HT - sinks_H1)
        out = (out * share_HT.T[..., None]).to(out.dtype)
        ctx.save_for_backward(q, k, v, sinks_H, out, torch.logaddexp(lse_HT, sinks_H1))
        ctx.kernel = kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, out, lse_HT = ctx.saved_tensors
        (grad,) = grads
        dq, dk, dv = ctx.kernel.backward(grad, q, k, v, out, lse_HT)
        products_HT = (grad.to(lse_HT.dtype) * out.to(lse_HT.dtype)).sum(-1).T
        weights_HT = torch.exp(sinks_H.to(lse_HT.dtype)[:, None] - lse_HT)
        return dq, dk, dv, -(weights_HT * products_HT).sum(1).to(sinks_H.dtype), None
