"""Shared by the planners: readers of Megatron layouts, copy operations of an entry, read limits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from math import prod
from pathlib import Path

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy import blocks
from shared.checkpoint.copy.byte_view import StridedView
from shared.checkpoint.copy.operations import (
    AddConstant,
    CopyOperation,
    TransposedRows,
    cast_operation,
    copy_rows,
    fill_value,
    transpose,
)
from shared.checkpoint.dtypes import Dtype, scalar_bytes, weight_dtype
from shared.checkpoint.formats.hugging_face import HfReader
from shared.checkpoint.formats.torch_dist_reader import TorchDistReader
from shared.checkpoint.formats.transformer_engine_reader import TeReader
from shared.cli import log
from shared.families import registry
from shared.mapping.layout import ONES, PADDING, segments_of_target
from shared.mapping.rule import Entry
from tools.convert.megatron_lm import MegatronLmReader

MegatronReader = TorchDistReader | TeReader | MegatronLmReader  # tensors in Megatron-Core's layout: [q.. k v | ...]


def with_stored_mtp(architecture: Architecture, names: Collection[str], where: Path) -> Architecture:
    """The architecture, without MTP layers if `names` has no MTP tensor; that is logged."""
    stored = registry.drop_missing_mtp(architecture, names)
    if stored != architecture:
        log(f"mtp: off (config.json declares MTP layers, {where} has none)")
    return stored


def entry_operations(entry: Entry, dtype: Dtype, reader: HfReader, first: int, count: int) -> Iterator[CopyOperation]:
    """Copy operations of rows `first` to `first + count` of an entry, from its Hugging Face sources."""
    for segment in segments_of_target(entry.segments, first, count):
        if segment.source in (PADDING, ONES):
            filler = scalar_bytes(1 if segment.source == ONES else 0, dtype)
            yield from fill_value(filler, segment.rows * prod(entry.shape[1:]))
            continue
        source = entry.sources[segment.source]
        tensor = reader.weights[source.name].at(source.index)
        stored, view = weight_dtype(tensor.dtype, tensor.name, tensor.place), tensor.view()
        limit = read_limit(stored, dtype)
        operations: Iterable[CopyOperation]
        if entry.transposed and not tensor.transposed:
            rows = tensor.shape[0]
            parts = (TransposedRows(view=view, row=0, rows=rows, column=0),)
            operations = transpose(parts, segment.source_row, segment.rows, rows, stored.size, limit, segment.step)
        elif segment.step > 1:
            strided = StridedView(view=view, first=segment.source_row, rows=segment.rows, step=segment.step)
            operations = copy_rows(strided, 0, strided.rows, limit // segment.step)
        else:
            operations = copy_rows(view, segment.source_row, segment.rows, limit)
        if entry.zero_centered_gamma:
            place = f"{tensor.place}: {tensor.name}"
            for operation in operations:
                yield AddConstant(operation=operation, constant=-1.0, source=stored, target=dtype, exact_name=place)
        else:
            yield from (cast_operation(operation, stored, dtype) for operation in operations)


def read_limit(source: Dtype, target: Dtype) -> int:
    """Maximum bytes per read: neither the bytes read nor the cast bytes exceed a block."""
    return blocks.BLOCK * source.size // max(source.size, target.size)
