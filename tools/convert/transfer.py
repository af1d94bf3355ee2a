"""Moves tensors between the two forms: plans what goes where, then copies rows.

Nothing here knows a family. A plan accounts for every tensor first; after that each Megatron byte is written once and
each Hugging Face byte read once, in blocks, so that memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from shared.checkpoint.blocks import BLOCK, Files
from shared.checkpoint.dtypes import Dtype, cast, common, weight_dtype
from shared.checkpoint.hf import HfReader, WeightLayout, default_layout
from shared.checkpoint.safetensors_file import TensorInfo
from shared.checkpoint.torch_dist import NOT_WEIGHTS, TorchDistReader
from shared.checkpoint.torch_dist_writer import CHUNK_BYTES, TorchDistWriter
from shared.errors import UserError
from shared.families import registry
from shared.mapping.account import Account, account_sources, account_targets
from shared.mapping.layout import PADDING, of_source, of_target
from shared.mapping.rule import Entry
from shared.model.architecture import Architecture

Advance = Callable[[int], None]

# What TransformerEngine's modules keep beside their weights. Megatron-Core asks for these objects when its layers are
# TransformerEngine's, and passes over them otherwise; for a model without FP8 state each is None.
_LAYER_STATES = (
    *("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"),
    *("self_attention.q_layernorm", "self_attention.k_layernorm"),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
)


@dataclass(frozen=True, kw_only=True)
class Import:
    """What becomes of a Hugging Face checkpoint's tensors."""

    architecture: Architecture
    account: Account
    dtypes: dict[str, Dtype]  # of each Megatron tensor
    widened: tuple[str, ...]  # Megatron tensors whose slices differ in type, held in the wider one

    @property
    def bytes(self) -> int:
        """Bytes of weights to be written."""
        return sum(prod(entry.shape) * self.dtypes[entry.key].size for entry in self.account.entries)


def plan_import(reader: HfReader) -> Import:
    """Match a checkpoint with its family; UserError if a tensor would be lost, made up or misread."""
    architecture = registry.from_config(reader.config)
    account = account_sources(registry.table_of(architecture), reader.tensors, str(reader.path))
    kinds: dict[str, set[Dtype]] = {}
    for entry in account.entries:
        for source in entry.sources:
            tensor = reader.tensors[source.name]
            kinds.setdefault(entry.key, set()).add(weight_dtype(tensor.dtype, source.name, tensor.place))
    for alias in account.aliases:
        _check_alias(reader, alias.name, alias.of)
    return Import(
        architecture=architecture,
        account=account,
        dtypes={key: common(found) for key, found in kinds.items()},
        widened=tuple(key for key, found in kinds.items() if len(found) > 1),
    )


def _check_alias(reader: HfReader, name: str, of: str) -> None:
    same = reader.tensors[name].dtype == reader.tensors[of].dtype
    if not same or any(a != b for a, b in zip(reader.rows(name), reader.rows(of), strict=True)):
        raise UserError(
            f"{reader.tensors[name].place}: {name} differs from {of}, though config.json ties them "
            "(tie_word_embeddings) and one would be lost; set tie_word_embeddings to false, or remove it"
        )


def write_import(plan: Import, reader: HfReader, writer: TorchDistWriter, advance: Advance) -> None:
    """Write every tensor, then the objects that loaders ask for."""
    declared: set[str] = set()
    for entry in plan.account.entries:
        dtype = plan.dtypes[entry.key]
        if entry.key not in declared:
            writer.declare(entry.key, dtype, entry.global_shape)
            declared.add(entry.key)
        rows, columns = entry.shape[0], prod(entry.shape[1:])
        pieces = -(-rows * columns * dtype.size // CHUNK_BYTES)
        step = -(-rows // pieces)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            rest = (0,) * (len(entry.shape) - 1)
            blocks = counted(target_rows(entry, dtype, reader, first, count), advance)
            sizes = ((1,) * len(entry.index)) + (count, *entry.shape[1:])
            writer.chunk(entry.key, (*entry.index, first, *rest), sizes, blocks)
    layers = plan.architecture.num_layers
    for module in _LAYER_STATES:
        for layer in range(layers):
            writer.put_object(f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}", [None])
    writer.put_object("decoder.final_layernorm._extra_state/shard_0_1", [None])
    writer.finish(
        {
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
        }
    )


def target_rows(entry: Entry, dtype: Dtype, reader: HfReader, first: int, count: int) -> Iterator[memoryview]:
    """Bytes of rows of a Megatron tensor's slice, gathered from its sources."""
    row_bytes = prod(entry.shape[1:]) * dtype.size
    turned: dict[str, np.ndarray] = {}  # of transposed sources
    for segment in of_target(entry.segments, first, count):
        if segment.source == PADDING:
            yield from _zeros(segment.rows * row_bytes)
            continue
        name = entry.sources[segment.source].name
        own = weight_dtype(reader.tensors[name].dtype, name, reader.tensors[name].place)
        if entry.transposed:
            if name not in turned:
                turned[name] = _transpose(reader.rows(name), reader.tensors[name].shape, own)
            columns = turned[name][segment.source_row : segment.source_row + segment.rows]
            yield cast(memoryview(columns).cast("B"), own, dtype)
            continue
        for block in reader.rows(name, segment.source_row, segment.rows):
            yield cast(block, own, dtype)


def _transpose(blocks: Iterable[memoryview], shape: tuple[int, ...], dtype: Dtype) -> np.ndarray:
    """A whole matrix, given by its rows, as rows of its transpose; numbers are moved as bits."""
    data = np.frombuffer(b"".join(blocks), dtype=f"u{dtype.size}").reshape(shape)
    return np.ascontiguousarray(data.T)


@dataclass(frozen=True, kw_only=True)
class Export:
    """How a Megatron checkpoint becomes a Hugging Face one."""

    architecture: Architecture
    layout: WeightLayout
    origin: dict[str, tuple[Entry, int]]  # Hugging Face name -> the slice it is in, and as which source
    asides: dict[str, TensorInfo]  # tensors that are no weights, kept in a file of their own
    rounded: tuple[str, ...]  # tensors that are written in a narrower type than they are held in

    @property
    def bytes(self) -> int:
        """Bytes of weights to be written."""
        return sum(tensor.size for tensor in self.layout.tensors().values())


def plan_export(
    reader: TorchDistReader,
    architecture: Architecture,
    layout: WeightLayout | None,
    asides: Mapping[str, TensorInfo],
    dtype: Dtype | None,
) -> Export:
    """Match a Megatron checkpoint with its family and the shards it is to have.

    Args:
        reader: the iteration.
        architecture: what hf/config.json says.
        layout: the source's shards; None for transformers' default.
        asides: tensors kept beside the Megatron form.
        dtype: the type of every weight; None for the source's own, or where there is no layout the checkpoint's.
    """
    table = registry.table_of(architecture)
    if layout is not None:
        table = table.named_as(layout.tensors())
    entries = account_targets(table, reader.tensors, str(reader.directory), NOT_WEIGHTS)
    origin = {source.name: (entry, place) for entry in entries for place, source in enumerate(entry.sources)}
    shapes = {name: entry.sources[place].shape for name, (entry, place) in origin.items()}
    if layout is None:
        held = [(n, reader.tensors[origin[n][0].key].dtype.safetensors, shapes[n]) for n in sorted(origin)]
        layout = default_layout(held)
    names = layout.tensors()
    for alias in table.aliases:
        if alias.name in names:
            origin[alias.name], shapes[alias.name] = origin[alias.of], shapes[alias.of]
    if absent := sorted(shapes.keys() - names.keys()):
        raise UserError(
            f"hf/weights.json has no place for {absent[0]}, which hf/config.json asks for; restore the file"
        )
    if unknown := sorted(names.keys() - shapes.keys() - asides.keys()):
        raise UserError(f"hf/weights.json asks for {unknown[0]}, which is in no file; restore hf/ from the source")
    for name, shape in shapes.items():
        if names[name].shape != shape:
            raise UserError(
                f"hf/weights.json: {name} is {list(names[name].shape)}, hf/config.json asks for {list(shape)}"
            )
    if dtype is not None:
        layout = layout.with_dtypes(dict.fromkeys(shapes, dtype.safetensors))
    final = layout.tensors()
    kept = {name: tensor for name, tensor in asides.items() if name in final}
    rounded = tuple(
        name
        for name, (entry, _) in origin.items()
        if common([reader.tensors[entry.key].dtype, weight_dtype(final[name].dtype, name, "hf/weights.json")]).size
        > weight_dtype(final[name].dtype, name, "hf/weights.json").size
    )
    return Export(architecture=architecture, layout=layout, origin=origin, asides=kept, rounded=rounded)


def source_rows(plan: Export, reader: TorchDistReader, tensor: TensorInfo) -> Iterator[memoryview]:
    """Bytes of a Hugging Face tensor, gathered from the Megatron one it is in."""
    if tensor.name in plan.asides:
        kept = plan.asides[tensor.name]
        with Files() as files:
            yield from files.blocks(kept.file, kept.start, kept.size, kept.row_bytes)
        return
    entry, place = plan.origin[tensor.name]
    held = reader.tensors[entry.key].dtype
    wanted = weight_dtype(tensor.dtype, tensor.name, tensor.place)
    if entry.transposed:
        columns = tensor.shape[::-1]
        rows = (
            block
            for segment in of_source(entry.segments, place)
            for block in reader.rows(entry.key, entry.index, segment.target_row, segment.rows)
        )
        yield cast(memoryview(_transpose(rows, columns, held)).cast("B"), held, wanted)
        return
    for segment in of_source(entry.segments, place):
        for block in reader.rows(entry.key, entry.index, segment.target_row, segment.rows):
            yield cast(block, held, wanted)


def counted(blocks: Iterator[memoryview], advance: Advance) -> Iterator[memoryview]:
    """The same blocks; `advance` is told the bytes of each."""
    for block in blocks:
        yield block
        advance(len(block))


_ZEROS = memoryview(np.zeros(BLOCK, dtype=np.uint8))


def _zeros(size: int) -> Iterator[memoryview]:
    for start in range(0, size, BLOCK):
        yield _ZEROS[: min(BLOCK, size - start)]
