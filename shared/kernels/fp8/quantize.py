"""Codes of one operand of an FP8 linear layer, as its recipe scales it; by Triton kernels on a GPU, by torch elsewhere."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from shared.console import log
from shared.kernels.fp8 import torch_coder
from shared.kernels.fp8.blockwise import BLOCK
from shared.kernels.fp8.fused_source import Source
from shared.kernels.fp8.product import Quantized
from shared.kernels.fp8.recipes import Kind
from shared.kernels.fp8.scales import scale_of
from shared.kernels.fp8.tensor_state import LinearState
from shared.kernels.fp8.torch_coder import Blocks, Encoded

type Groups = tuple[ProcessGroup, ...]


def coder(device: torch.device) -> Any:
    """The module that computes amax and codes on a device: `triton_coder` or `torch_coder`, which give the same bytes."""
    if device.type != "cuda":
        return torch_coder
    if importlib.util.find_spec("triton") is None:
        _announce_torch()
        return torch_coder
    from shared.kernels.fp8 import triton_coder

    return triton_coder


@cache
def _announce_torch() -> None:
    log("fp8         casts are torch's, each pass over memory by itself: Triton is not installed")


def quantize(
    x: Source,
    state: LinearState,
    kind: Kind,
    groups: tuple[Groups, Groups],
    *,
    record: bool,
    transposed: bool = False,
) -> tuple[Quantized, Quantized | None]:
    """The codes of a matrix for a product that sums over its columns, and for one that sums over its rows.

    Args:
        x: `[rows, columns]`, of any strides, or what stands for it.
        state: of the layer; its recipe says which elements share a scale.
        kind: of tensor.
        groups: ranks that hold other rows, and other columns.
        record: add amax and counts to the state.
        transposed: whether the second is wanted; else it is None.

    Returns:
        The codes of `x`, and of its transpose.
    """
    recipe, tensor, by = state.recipe, state.tensors[kind], coder(x.device)
    two, dtype = recipe.power_of_two_scales, tensor.dtype
    if recipe.name == "blockwise":
        blocks = Blocks(rows=BLOCK if kind == "weights" else 1, power_of_two=two)
        done: Encoded = by.encode_blocks(x, blocks, dtype, transposed=transposed, record=record)
        found = done.amax
    elif recipe.name == "rowwise":
        rows_found = _over(by.row_amax(x), groups[1])
        done = by.encode_matrix(x, scale_of(rows_found, dtype, power_of_two=two), dtype, record=record)
        found = rows_found.amax() if len(x) else rows_found.new_zeros(())
    else:
        highest = tensor.history.highest if tensor.scaling == "delayed" else None
        if highest is None:
            known = by.row_amax(x).amax() if len(x) else torch.zeros((), device=x.device)
            known = found = _over(known, (*groups[0], *groups[1]))
        else:
            known, found = torch.full((), highest, dtype=torch.float32, device=x.device), None
        scale = scale_of(known, dtype, power_of_two=two)
        done = by.encode_matrix(x, scale, dtype, transposed=transposed, record=record)
        found = done.amax if found is None else found
    if record:
        tensor.record(found, done.counts)
    first = Quantized(codes=done.codes, scale=done.scale, blocks=recipe.name == "blockwise")
    if not transposed:
        return first, None
    if recipe.name == "rowwise":  # its scales are of the other axis
        return first, quantize(x.t(), state, kind, groups[::-1], record=False)[0]
    return first, Quantized(codes=done.transposed, scale=done.transposed_scale, blocks=first.blocks)


def transposed_weight(
    weight: torch.Tensor, scale: torch.Tensor, state: LinearState, groups: tuple[Groups, Groups]
) -> Quantized:
    """The codes of `W^T`.

    Args:
        weight: `[N, K]`.
        scale: of the forward pass; a tensor's is used again, with no amax over ranks.
        state: of the layer.
        groups: ranks that hold other rows, and other columns, of W.
    """
    if state.recipe.scales_of_tensors:
        done = coder(weight.device).encode_matrix(weight.t(), scale, state.tensors["weights"].dtype)
        return Quantized(codes=done.codes, scale=scale)
    return quantize(weight.t(), state, "weights", groups[::-1], record=False)[0]


def _over(found: torch.Tensor, groups: Groups) -> torch.Tensor:
    """An amax over ranks that hold other elements: collective."""
    if groups:
        found = found.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a MAX of gloo ignores NaN on some ranks
        for group in groups:
            all_reduce(found, ReduceOp.MAX, group=group)
    return found
