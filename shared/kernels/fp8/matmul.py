"""A linear layer in FP8: forward pass, gradient of the input (dgrad) and of the weight (wgrad).

Letters: T tokens, K input features, N output features.

    y[T, N] = x W^T      dx[T, K] = g W      dW[N, K] = g^T x

Each operand is quantised along the axis that its product sums over: x along K and, for dW, along T; W along K and, for dx,
along N; g along N and, for dW, along T.

What is kept for the backward pass: the codes of x that dW needs, one byte an element, of this rank's part of the sequence. Codes
of weights are made anew in each pass: the bf16 weight is there anyway, a cast reads it once, and kept codes would be a byte per
parameter and direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup, all_gather_into_tensor
from torch.nn import functional

from shared.kernels.fp8.blockwise import BLOCK, block_amax, spread
from shared.kernels.fp8.codes import count, encode
from shared.kernels.fp8.product import Quantized, product
from shared.kernels.fp8.recipes import Kind
from shared.kernels.fp8.scales import amax, scale_of
from shared.kernels.fp8.tensor_state import LinearState

type Groups = tuple[ProcessGroup, ...]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The ranks that hold other parts of a linear layer's operands, by axis. An amax over an axis is over all of them."""

    tokens: Groups = ()  # context-parallel ranks
    inputs: Groups = ()  # K: tensor-parallel ranks of a row-parallel layer
    outputs: Groups = ()  # N: tensor-parallel ranks of a column-parallel layer
    sequence: ProcessGroup | None = None  # sequence-parallel ranks, each of which keeps its part of x


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, state: LinearState, shards: Shards) -> torch.Tensor:
    """`x W^T` with gradients, in FP8; in the dtype of `x` once the guard took the layer out of FP8.

    Amax and counts are recorded only where gradients are: not in validation, and once with recomputation, whose first forward
    pass has none.

    Args:
        x: `[..., K]`; of all the sequence, on sequence-parallel ranks.
        weight: `[N, K]`.
        state: of the layer.
        shards: of the layer.

    Returns:
        `[..., N]`.
    """
    if state.in_bf16:
        return functional.linear(x, weight)
    flat = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = _Fp8Linear.apply(flat, weight, state, shards, torch.is_grad_enabled())
    return y.view(*x.shape[:-1], len(weight))


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, state: LinearState, shards: Shards, training: bool
    ) -> torch.Tensor:
        ctx.state, ctx.shards = state, shards
        activations = quantize(x, state, "activations", (shards.tokens, shards.inputs), record=training)
        weights = quantize(weight, state, "weights", (shards.outputs, shards.inputs), record=training)
        if training:
            ctx.dtypes = x.dtype, weight.dtype
            kept: list[torch.Tensor | None] = [None, None]
            if ctx.needs_input_grad[1]:
                by_column = _transposed(x, activations, state, "activations", (shards.inputs, shards.tokens))
                kept = [_own_tokens(by_column.codes.t(), shards.sequence), by_column.scale]
            ctx.save_for_backward(weight, weights.scale, *kept)
        return product(activations, weights, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale, codes, codes_scale = ctx.saved_tensors
        state, shards = ctx.state, ctx.shards
        x_dtype, weight_dtype = ctx.dtypes
        (g,) = gradients
        by_row = quantize(g, state, "gradients", (shards.tokens, shards.outputs), record=True)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            weights = _transposed_weight(weight, scale, state, shards)
            of_x = product(by_row, weights, x_dtype)
        if codes is not None:
            by_column = _transposed(g, by_row, state, "gradients", (shards.outputs, shards.tokens))
            x = Quantized(
                codes=_all_tokens(codes, shards.sequence).t().contiguous(),
                scale=codes_scale,
                blocks=state.recipe.name == "blockwise",
            )
            of_weight = product(by_column, x, weight_dtype)
        return of_x, of_weight, None, None, None


def quantize(
    x: torch.Tensor, state: LinearState, kind: Kind, groups: tuple[Groups, Groups], *, record: bool
) -> Quantized:
    """The codes of a matrix, for a product that sums over its columns.

    Args:
        x: `[rows, columns]`.
        state: of the layer; its recipe says which elements share a scale.
        kind: of tensor.
        groups: ranks that hold other rows, and other columns.
        record: add amax and counts to the state.
    """
    recipe, tensor = state.recipe, state.tensors[kind]
    block_rows = BLOCK if kind == "weights" else 1
    if recipe.scales_of_tensors:
        highest = tensor.history.highest if tensor.scaling == "delayed" else None
        if highest is None:
            found = amax(x, (0, 1), (*groups[0], *groups[1])).view(())
        else:
            found = amax(x, (0, 1)).view(()) if record else torch.zeros((), device=x.device)
        known = found if highest is None else torch.full_like(found, highest)
    elif recipe.name == "rowwise":
        found = known = amax(x, (1,), groups[1])
    else:
        found = known = block_amax(x, block_rows)
    scale = scale_of(known, tensor.dtype, power_of_two=recipe.power_of_two_scales)
    blocks = recipe.name == "blockwise"
    scaled = x.float() / (spread(scale, x.shape, block_rows) if blocks else scale)
    if record:
        tensor.record(found.amax() if found.numel() else found.new_zeros(()), count(scaled, tensor.dtype))
    return Quantized(codes=encode(scaled, tensor.dtype), scale=scale, blocks=blocks)


def _transposed(
    x: torch.Tensor, known: Quantized, state: LinearState, kind: Kind, groups: tuple[Groups, Groups]
) -> Quantized:
    """The codes of `x^T`. `known`: those of `x`, the same numbers if the tensor has one scale; `groups`: of `x^T`."""
    if state.recipe.scales_of_tensors:
        return Quantized(codes=known.codes.t().contiguous(), scale=known.scale)
    return quantize(x.t().contiguous(), state, kind, groups, record=False)


def _transposed_weight(weight: torch.Tensor, scale: torch.Tensor, state: LinearState, shards: Shards) -> Quantized:
    """The codes of `W^T`. `scale`: of the forward pass, which made these codes but for scales of rows."""
    if state.recipe.name == "rowwise":
        return quantize(weight.t().contiguous(), state, "weights", (shards.inputs, shards.outputs), record=False)
    blocks = state.recipe.name == "blockwise"
    scaled = weight.float() / (spread(scale, weight.shape, BLOCK) if blocks else scale)
    codes = encode(scaled, state.tensors["weights"].dtype)
    return Quantized(codes=codes.t().contiguous(), scale=scale.t().contiguous() if blocks else scale, blocks=blocks)


def _own_tokens(codes: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """This rank's part of codes `[T, K]`."""
    if group is None:
        return codes.contiguous()
    return codes.chunk(group.size())[group.rank()].contiguous()


def _all_tokens(codes: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Codes `[T, K]` of all ranks of a group. As bytes: gloo and NCCL gather no FP8 numbers."""
    if group is None:
        return codes
    gathered = torch.empty((len(codes) * group.size(), codes.shape[1]), dtype=torch.uint8, device=codes.device)
    all_gather_into_tensor(gathered, codes.view(torch.uint8), group=group)
    return gathered.view(codes.dtype)
