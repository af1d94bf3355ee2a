"""FP8 linear layers of groups of rows, as the experts of MoE need them: every expert's codes are those of its own layer.

Letters: T rows (tokens), T_g those of a group, G groups (experts), K input features, N output features.

Operands are quantised one expert after another, with the expert's scales, history and counts. Their products are one
`torch._scaled_grouped_mm` on GPUs that have it, which takes a scale for each row: a tensor's scale is repeated for its rows.
Elsewhere they are computed one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from shared.kernels.fp8.codes import E4M3
from shared.kernels.fp8.matmul import Shards, fp8_linear
from shared.kernels.fp8.product import Quantized, product
from shared.kernels.fp8.quantize import quantize, transposed_weight
from shared.kernels.fp8.recipes import Fp8Recipe
from shared.kernels.fp8.tensor_state import LinearState

_ALIGNMENT = 16  # of K and N, and of each group's tokens where a product sums over them
_CAPABILITIES = ((9, 0), (10, 0))


def grouped_fp8_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    counts: torch.Tensor,
    states: Sequence[LinearState],
    shards: Shards,
) -> torch.Tensor:
    """`y[rows of g] = x[rows of g] @ weights[g].T` for every group g, with gradients: as `fp8_linear` of each.

    Args:
        x: `[T, K]`, rows in the order of their groups.
        weights: G matrices `[N, K]`.
        counts: rows of each group, int64 `[G]`, zeros allowed, T in all. On the CPU: then there is no host sync.
        states: of the G layers.
        shards: of the layers.

    Returns:
        `[T, N]`.
    """
    rows = counts.tolist()
    if any(state.in_bf16 for state in states):  # the guard took one out of FP8
        parts = zip(x.split(rows), weights, states, strict=True)
        return torch.cat([fp8_linear(part, weight, state, shards) for part, weight, state in parts])
    y: torch.Tensor = _GroupedFp8Linear.apply(x, rows, states, shards, torch.is_grad_enabled(), *weights)
    return y


class _GroupedFp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        rows: list[int],
        states: Sequence[LinearState],
        shards: Shards,
        training: bool,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.rows, ctx.states, ctx.shards, ctx.dtype = rows, states, shards, x.dtype
        keeps = training and any(ctx.needs_input_grad[5:])
        inputs: list[Quantized] = []
        by_column: list[Quantized] = []
        of_weights: list[Quantized] = []
        for part, weight, state in zip(x.split(rows), weights, states, strict=True):
            found, other = quantize(
                part, state, "activations", (shards.tokens, shards.inputs), record=training, transposed=keeps
            )
            inputs.append(found)
            by_column += [other] if other is not None else []
            groups = shards.outputs, shards.inputs
            of_weights.append(quantize(weight, state, "weights", groups, record=training)[0])
        if training:
            ctx.keeps = keeps
            kept = [tensor for each in by_column for tensor in (each.codes, each.scale)]
            ctx.save_for_backward(*weights, *(each.scale for each in of_weights), *kept)
        return products_of_rows(inputs, of_weights, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        groups, states, shards, saved = len(ctx.rows), ctx.states, ctx.shards, ctx.saved_tensors
        weights, scales, kept = saved[:groups], saved[groups : 2 * groups], saved[2 * groups :]
        by_row: list[Quantized] = []
        by_column: list[Quantized] = []
        turned: list[Quantized] = []
        for part, weight, scale, state in zip(gradient.split(ctx.rows), weights, scales, states, strict=True):
            found, other = quantize(
                part, state, "gradients", (shards.tokens, shards.outputs), record=True, transposed=ctx.keeps
            )
            by_row.append(found)
            by_column += [other] if other is not None else []
            if ctx.needs_input_grad[0]:
                turned.append(transposed_weight(weight, scale, state, (shards.outputs, shards.inputs)))
        of_x = products_of_rows(by_row, turned, ctx.dtype) if ctx.needs_input_grad[0] else None
        gradients_of_weights: Sequence[torch.Tensor | None] = [None] * groups
        if ctx.keeps:
            inputs = [
                Quantized(codes=codes, scale=scale, blocks=each.blocks)
                for each, codes, scale in zip(by_column, kept[::2], kept[1::2], strict=True)
            ]
            gradients_of_weights = products_over_rows(by_column, inputs, weights[0].dtype)
        return of_x, None, None, None, None, *gradients_of_weights


def products_of_rows(left: Sequence[Quantized], right: Sequence[Quantized], dtype: torch.dtype) -> torch.Tensor:
    """`left_g right_g^T` of each group, one below the other: `[T, N]`.

    Args:
        left: G matrices `[T_g, K]`.
        right: G matrices `[N, K]`.
        dtype: of the result.
    """
    if _one_by_one(left, right, (left[0].codes.shape[1], len(right[0].codes))):
        return torch.cat([product(a, b, dtype) for a, b in zip(left, right, strict=True)])
    return together_of_rows(left, right).to(dtype)


def together_of_rows(left: Sequence[Quantized], right: Sequence[Quantized]) -> torch.Tensor:
    """`products_of_rows` in one product of CUDA's, bf16."""
    codes = torch.cat([each.codes.view(torch.uint8) for each in left]).view(E4M3)
    others = torch.stack([each.codes.view(torch.uint8) for each in right]).view(E4M3)
    return torch._scaled_grouped_mm(
        codes,
        others.transpose(-2, -1),
        torch.cat([_of_rows(each) for each in left]),
        torch.stack([_of_rows(each) for each in right]),
        offs=_ends([len(each.codes) for each in left], codes.device),
        out_dtype=torch.bfloat16,
    )


def products_over_rows(
    left: Sequence[Quantized], right: Sequence[Quantized], dtype: torch.dtype
) -> Sequence[torch.Tensor]:
    """`left_g right_g^T` of each group, which sums over its tokens: G matrices `[N, K]`.

    Args:
        left: G matrices `[N, T_g]`.
        right: G matrices `[K, T_g]`.
        dtype: of the results.
    """
    if _one_by_one(left, right, (len(left[0].codes), len(right[0].codes))):
        return [product(a, b, dtype) for a, b in zip(left, right, strict=True)]
    return together_over_rows(left, right).to(dtype).unbind()


def together_over_rows(left: Sequence[Quantized], right: Sequence[Quantized]) -> torch.Tensor:
    """`products_over_rows` in one product of CUDA's, bf16 `[G, N, K]`."""
    # A group without tokens has 16 of zeros: its gradient is zero, not what was in memory.
    wide = [max(-(-each.codes.shape[1] // _ALIGNMENT), 1) * _ALIGNMENT for each in left]
    codes, others = (
        torch.cat(
            [
                functional.pad(each.codes.view(torch.uint8), (0, width - each.codes.shape[1]))
                for each, width in zip(side, wide, strict=True)
            ],
            1,
        ).view(E4M3)
        for side in (left, right)
    )
    return torch._scaled_grouped_mm(
        codes,
        others.t(),
        torch.cat([_of_rows(each) for each in left]),
        torch.cat([_of_rows(each) for each in right]),
        offs=_ends(wide, codes.device),
        out_dtype=torch.bfloat16,
    )


def _of_rows(quantized: Quantized) -> torch.Tensor:
    """A scale for each row: fp32 `[rows]`."""
    return quantized.scale.reshape(-1).expand(len(quantized.codes))


def _ends(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    """The end of each group, int32 `[G]`."""
    return torch.tensor(rows).cumsum(0).to(torch.int32).to(device, non_blocking=True)


def _one_by_one(left: Sequence[Quantized], right: Sequence[Quantized], sizes: tuple[int, int]) -> bool:
    """Whether these products are not one of CUDA's; `sizes`: of their operands but T."""
    device = left[0].codes.device
    if device.type == "cpu" or left[0].blocks or not any(each.codes.numel() for each in left):
        return True
    both = left[0].codes.dtype == right[0].codes.dtype == E4M3
    whole = not any(size % _ALIGNMENT for size in sizes)
    return not (both and whole and torch.cuda.get_device_capability(device) in _CAPABILITIES)


def obstacle(
    recipe: Fp8Recipe, sizes: Sequence[int], device: torch.device, capability: tuple[int, int] | None = None
) -> str | None:
    """Why products of groups are computed one after another, as a clause; None if they are one, or on a CPU.

    Args:
        recipe: of the layers.
        sizes: N and K of every product.
        device: of the operands.
        capability: compute capability of a CUDA device.
    """
    if device.type == "cpu":
        return None
    if recipe.name == "blockwise":
        return "torch multiplies no groups of FP8 numbers with scales of blocks"
    if odd := [size for size in sizes if size % _ALIGNMENT]:
        return f"{odd[0]} is no multiple of {_ALIGNMENT} FP8 numbers"
    if capability not in _CAPABILITIES:
        return "torch multiplies groups of FP8 numbers on GPUs of compute capability 9.0 and 10.0 only"
    return None


def gradient_obstacle(recipe: Fp8Recipe, device: torch.device) -> str | None:
    """Why products of gradients are computed one after another though those of the forward pass are not, as a clause."""
    if device.type == "cpu" or recipe.format != "hybrid":
        return None
    return "torch multiplies groups of E4M3 only, gradients are E5M2 (--fp8-format e4m3 has them in E4M3)"
