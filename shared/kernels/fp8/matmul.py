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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup, all_gather_into_tensor
from torch.nn import functional

from shared.kernels.fp8.fused_source import Source
from shared.kernels.fp8.product import Quantized, product
from shared.kernels.fp8.quantize import Groups, quantize, transposed_weight
from shared.kernels.fp8.tensor_state import LinearState


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
        ctx.state, ctx.shards, ctx.dtype = state, shards, x.dtype
        y, kept = forward_pass(x, weight, state, shards, training=training, keeps=ctx.needs_input_grad[1])
        if training:
            ctx.save_for_backward(weight, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        of_x, of_weight = backward_pass(
            gradients[0], weight, kept, ctx.state, ctx.shards, ctx.dtype if ctx.needs_input_grad[0] else None
        )
        return of_x, of_weight, None, None, None


type Kept = Sequence[torch.Tensor | None]  # scale of the weight; codes and scale of x, or None


def forward_pass(
    x: Source, weight: torch.Tensor, state: LinearState, shards: Shards, *, training: bool, keeps: bool
) -> tuple[torch.Tensor, Kept]:
    """`x W^T`, and what `backward_pass` needs.

    Args:
        x: `[T, K]`.
        weight: `[N, K]`.
        state: of the layer.
        shards: of the layer.
        training: record amax and counts.
        keeps: keep codes of x for the gradient of the weight, in training.
    """
    keeps = training and keeps
    activations, by_column = quantize(
        x, state, "activations", (shards.tokens, shards.inputs), record=training, transposed=keeps
    )
    weights, _ = quantize(weight, state, "weights", (shards.outputs, shards.inputs), record=training)
    kept: list[torch.Tensor | None] = [weights.scale, None, None]
    if by_column is not None:
        kept[1:] = _own_tokens(by_column.codes, shards.sequence), by_column.scale
    return product(activations, weights, x.dtype), kept


def backward_pass(
    g: torch.Tensor, weight: torch.Tensor, kept: Kept, state: LinearState, shards: Shards, dtype: torch.dtype | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x, in `dtype` unless that is None, and of the weight, if codes of x were kept. `g`: `[T, N]`."""
    scale, codes, codes_scale = kept
    by_row, by_column = quantize(
        g, state, "gradients", (shards.tokens, shards.outputs), record=True, transposed=codes is not None
    )
    of_x = of_weight = None
    if dtype is not None:
        assert scale is not None
        weights = transposed_weight(weight, scale, state, (shards.outputs, shards.inputs))
        of_x = product(by_row, weights, dtype)
    if by_column is not None:
        assert codes is not None
        assert codes_scale is not None
        x = Quantized(codes=_all_tokens(codes, shards.sequence), scale=codes_scale, blocks=by_row.blocks)
        of_weight = product(by_column, x, weight.dtype)
    return of_x, of_weight


def _own_tokens(codes: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """This rank's part of codes `[K, T]`."""
    return codes if group is None else codes.chunk(group.size(), 1)[group.rank()].contiguous()


def _all_tokens(codes: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Codes `[K, T]` of all ranks of a group. As bytes: gloo and NCCL gather no FP8 numbers."""
    if group is None:
        return codes
    inputs, tokens = codes.shape
    gathered = torch.empty((group.size() * inputs, tokens), dtype=torch.uint8, device=codes.device)
    all_gather_into_tensor(gathered, codes.view(torch.uint8), group=group)
    return gathered.view(-1, inputs, tokens).transpose(0, 1).reshape(inputs, -1).view(codes.dtype)
