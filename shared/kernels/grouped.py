"""Grouped GEMM: one product for each group of rows, as the experts of MoE need it.

Letters: T rows (tokens), G groups (experts), K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

_ALIGNMENT = 16  # bytes between rows of any operand


def grouped_linear(x: torch.Tensor, weights: Sequence[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    """`y[rows of g] = x[rows of g] @ weights[g].T` for every group g, with gradients of `x` and `weights`.

    One `torch.nn.functional.grouped_mm` each for the forward pass, the gradient of `x` and those of all weights. Weights are
    not copied if they lie in one tensor, evenly spaced (`stacked`).

    Args:
        x: `[T, K]`, rows in the order of their groups.
        weights: G matrices `[N, K]`.
        counts: rows of each group, int64 `[G]`, zeros allowed, T in all. On the CPU: then there is no host sync.

    Returns:
        `[T, N]` in the dtype of `x`.

    Raises:
        RuntimeError: `obstacle` says why.
    """
    # grouped_mm wants the end of each group, on the device of the operands.
    ends = counts.cumsum(0).to(torch.int32).to(x.device, non_blocking=True)
    y: torch.Tensor = _GroupedLinear.apply(x, ends, *weights)
    return y


class _GroupedLinear(torch.autograd.Function):
    """Saves the weights themselves, not a stack of them: a copy would live until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ends: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, ends, *weights)
        return functional.grouped_mm(x, stacked(weights).transpose(-2, -1), offs=ends)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, ends, *weights = ctx.saved_tensors
        gradient = gradients[0].contiguous()  # grouped_mm refuses an expanded one, as `sum` makes it
        of_x = functional.grouped_mm(gradient, stacked(weights), offs=ends) if ctx.needs_input_grad[0] else None
        of_weights: Sequence[torch.Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[2:]):
            of_weights = functional.grouped_mm(gradient.t(), x, offs=ends).unbind()
        return of_x, None, *of_weights


def stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """G tensors `[N, K]` as one `[G, N, K]`: a view if they lie evenly spaced in one storage, in order; else a copy."""
    first = weights[0]
    start, (rows, columns) = first.data_ptr(), first.shape
    step = weights[-1].data_ptr() - start
    step = step // (len(weights) - 1) if len(weights) > 1 else first.nbytes
    end = first.untyped_storage().data_ptr() + first.untyped_storage().nbytes()
    even = all(weight.data_ptr() == start + index * step for index, weight in enumerate(weights))
    inside = start + (len(weights) - 1) * step + first.nbytes <= end
    if even and inside and step >= first.nbytes and first.is_contiguous():
        return first.as_strided((len(weights), rows, columns), (step // first.itemsize, columns, 1))
    return torch.stack(list(weights))


def group_rows(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Each group's row of `values` `[G, N]`, repeated for the rows of the group: `[T, N]`. `counts`: as above."""
    repeated: torch.Tensor = _GroupRows.apply(values, counts)
    return repeated


class _GroupRows(torch.autograd.Function):
    """Sums the gradient by a product with the groups' indicator matrix: fixed order, unlike `index_add` on CUDA."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        groups = torch.repeat_interleave(counts).to(values.device, non_blocking=True)
        ctx.save_for_backward(groups)
        ctx.groups = len(values)
        return values.index_select(0, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (groups,) = ctx.saved_tensors
        member = functional.one_hot(groups, ctx.groups).to(gradients[0].dtype)
        return member.t() @ gradients[0], None


def obstacle(
    dtype: torch.dtype, sizes: Sequence[int], device: torch.device, capability: tuple[int, int] | None = None
) -> str | None:
    """Why `grouped_linear` cannot compute these operands, as a clause; None if it can.

    Args:
        dtype: of the operands.
        sizes: N and K of every product.
        device: of the operands.
        capability: compute capability of a CUDA device.
    """
    name = str(dtype).removeprefix("torch.")
    odd = [size for size in sizes if size * dtype.itemsize % _ALIGNMENT]
    if odd:
        return f"rows of {odd[0]} {name} numbers are no multiple of {_ALIGNMENT} bytes"
    if device.type == "cpu":
        return None if dtype in (torch.float32, torch.bfloat16) else f"torch multiplies no groups of {name} on CPUs"
    if dtype != torch.bfloat16:
        return f"torch multiplies groups of bfloat16 only on GPUs, these are {name}"
    if capability is None or capability < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None
