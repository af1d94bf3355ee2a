"""The optimizer's tensors as shards of a checkpoint: every rank describes and writes its own range, and nothing is gathered.

The distributed optimizer of a rank holds a flat range of each weight. In the weight's own shape that is a few boxes:

    weight [4, 5], range 3 to 17:      . . . x x      box (0, 3), shape (1, 2)
                                       x x x x x      box (1, 0), shape (2, 5)
                                       x x x x x
                                       x x . . .      box (3, 0), shape (1, 2)

Keys and global shapes are those of Megatron-Core's `fully_reshardable`, so it loads them at any layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Shape = tuple[int, ...]


def param_state(part: DistributedOptimizer, weights: dict[str, Any]) -> dict[int, dict[str, list[ShardedTensor]]]:
    """This rank's shards of `param`, `exp_avg` and `exp_avg_sq` of each weight, views of the optimizer's memory.

    Args:
        part: the optimizer, with its state allocated.
        weights: the model's sharded state dict.
    """
    sharded, _ = extract_sharded_tensors_and_factories(weights)
    by_weight = {entry.data: entry for entry in nested_values(sharded)}
    found: dict[int, dict[str, list[ShardedTensor]]] = {}
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for weight, ranges in bucket["param_map"].items():
                    tensors = part._get_main_param_and_optimizer_states(weight)
                    tensors.pop("step", None)  # stored once, with the groups
                    found[len(found)] = {
                        name: _shards(by_weight[weight], name, tensor.detach().view(-1), ranges["param"].start)
                        for name, tensor in tensors.items()
                    }
    return found


def _shards(
    weight: ShardedTensor | ShardedTensorFactory, name: str, data: torch.Tensor, start: int
) -> list[ShardedTensor]:
    """Shards of one tensor of the state. `data`: this rank's range of it, flat; `start`: its place in the whole weight."""
    whole = _whole(weight, f"optimizer.state.{name}.{weight.key}", data.dtype)
    shards = []
    for tensor in whole:
        assert tensor.data.is_contiguous()
        first = tensor.data.storage_offset()  # of the weight's elements
        begin, end = max(first, start), min(first + tensor.data.numel(), start + len(data))
        place = begin - start
        for offset, shape in boxes(tensor.local_shape, begin - first, end - first):
            size = math.prod(shape)
            shards.append(_shard(tensor, offset, data[place : place + size].view(shape)))
            place += size
    return shards


def _whole(weight: ShardedTensor | ShardedTensorFactory, key: str, dtype: torch.dtype) -> list[ShardedTensor]:
    """The whole weight's sharded tensors under another key, without memory: gate and up of a fused weight are two."""
    data = torch.empty(weight.data.shape, dtype=dtype, device="meta")
    replica = (*weight.replica_id[:-1], 0)  # the last is the data-parallel rank, and every one has its own range
    if isinstance(weight, ShardedTensorFactory):
        return list(nested_values(replace(weight, key=key, data=data, replica_id=replica).build()))
    return [replace(weight, key=key, data=data, dtype=dtype, replica_id=replica)]


def _shard(tensor: ShardedTensor, offset: Shape, data: torch.Tensor) -> ShardedTensor:
    """A box of a sharded tensor. The axis of layers becomes one of the box: torch checks boxes without a regular grid."""
    layers = tensor.prepend_axis_num
    axes = (0,) * layers + offset
    shape = (1,) * layers + tuple(data.shape)
    return replace(
        tensor,
        data=data.view(shape),
        local_shape=shape,
        global_offset=tuple(a + b for a, b in zip(tensor.global_offset, axes, strict=True)),
        axis_fragmentations=None,
        prepend_axis_num=0,
    )


def boxes(shape: Shape, start: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    """Boxes (offset, shape) of elements `start` to `end` of a tensor, in C order: `2 * dimensions - 1` at most."""
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # within one row
        yield from _within_row(shape, last, start, end)
        return
    yield from _within_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _within_row(shape, last, last * row, end)


def _within_row(shape: Shape, index: int, start: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    begin = index * math.prod(shape[1:])
    for offset, size in boxes(shape[1:], start - begin, end - begin):
        yield (index, *offset), (1, *size)


def without_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor whose storage is no larger. Megatron-Core's writer copies views of larger storages.

    Tensors on a GPU are returned as they are: they are copied to the host anyway.
    """
    tensor = tensor.detach()
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return tensor
    return torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)
