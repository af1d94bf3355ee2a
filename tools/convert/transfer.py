"""Moves tensors between Hugging Face's form and another: plans what goes where, and of which moves each new file is made.

Nothing here knows a family. A plan accounts for every tensor first; after that each byte of the other form is written
once and each Hugging Face byte read once, in blocks, so that memory does not grow with the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy import blocks
from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import ByteView, ConcatenatedView, RowRange, StridedView
from shared.checkpoint.copy.engine import Task
from shared.checkpoint.copy.operations import (
    AddConstant,
    CopyOperation,
    FilePlan,
    NormalizeRows,
    TransposedRows,
    cast_operation,
    copy_rows,
    fill_value,
    stream,
    transpose,
)
from shared.checkpoint.dtypes import BF16, FP32, FP64, Dtype, common, number, weight_dtype
from shared.checkpoint.formats.hugging_face import HfReader, WeightLayout, default_layout, weight_files
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.checkpoint.formats.torch_dist_reader import NOT_WEIGHTS, TorchDistReader
from shared.checkpoint.formats.torch_dist_writer import CHUNK_BYTES, TorchDistLayout
from shared.checkpoint.formats.transformer_engine import STATE_TYPE, TeReader
from shared.errors import UserError
from shared.mapping.account import Account, account_sources, account_targets
from shared.mapping.extra_states import extra_states
from shared.mapping.layout import ONES, PADDING, Segment, Shape, segments_of_source, segments_of_target
from shared.mapping.rule import Entry, Table, TiedTensor
from shared.quantized.scheme import QuantizationScheme
from shared.quantized.stored_weight import Component, QuantizedWeight, Weight, assemble_weights, quantize
from tools.convert.megatron_lm import MegatronLmReader

FormReader = TorchDistReader | TeReader | MegatronLmReader


@dataclass(frozen=True, kw_only=True)
class Import:
    """What becomes of a Hugging Face checkpoint's tensors."""

    architecture: Architecture
    account: Account
    dtypes: dict[str, Dtype]  # of each Megatron tensor
    upcast: tuple[str, ...]  # Megatron tensors whose slices differ in type, held in the wider one

    @property
    def bytes(self) -> int:
        """Bytes of weights to be written."""
        return sum(prod(entry.shape) * self.dtypes[entry.key].size for entry in self.account.entries)


def plan_import(reader: HfReader, architecture: Architecture, table: Table) -> Import:
    """Match a checkpoint with its family's table; UserError if a tensor would be lost, made up or misread."""
    account = account_sources(table, reader.weights, str(reader.path))
    kinds: dict[str, set[Dtype]] = {}
    zero_centered_gamma = {entry.key for entry in account.entries if entry.zero_centered_gamma}
    for entry in account.entries:
        for source in entry.sources:
            tensor = reader.weights[source.name]
            kinds.setdefault(entry.key, set()).add(weight_dtype(tensor.dtype, source.name, tensor.place))
    most = Counter(kind for found in kinds.values() for kind in found).most_common(1)[0][0]
    for entry in account.entries:
        if not entry.sources:  # which the model lacks, perhaps beside a weight that it has
            kinds[entry.key] = kinds.get(entry.key.removesuffix("bias") + "weight", {most})
    return Import(
        architecture=architecture,
        account=account,
        dtypes={key: FP64 if key in zero_centered_gamma else common(found) for key, found in kinds.items()},
        upcast=tuple(key for key, found in kinds.items() if len(found) > 1),
    )


def tied_checks(plan: Import, reader: HfReader) -> list[Task]:
    """Reads of tensors that are stored though they are others; each raises UserError where they differ."""
    return [partial(_check_tied, reader, tied) for tied in plan.account.tied_tensors]


def _check_tied(reader: HfReader, tied: TiedTensor) -> None:
    name, of = tied.name, tied.tied_to
    same = reader.weights[name].dtype == reader.weights[of].dtype
    if not same or any(a != b for a, b in zip(reader.numbers(name), reader.numbers(of), strict=True)):
        ties, mend = "config.json ties them (tie_word_embeddings)", "set tie_word_embeddings to false, or remove it"
        if tied.always:
            ties, mend = "it stands for a copy", "remove it"
        raise UserError(
            f"{reader.weights[name].place}: {name} differs from {of}, though {ties} and one would be lost; {mend}"
        )


def layout_import(plan: Import, reader: HfReader) -> TorchDistLayout:
    """Every tensor's chunks, and the objects that loaders ask for.

    Chunks are in the order of what they are read from: a file of them needs few of the source's.
    """
    layout = TorchDistLayout()
    for entry in {entry.key: entry for entry in plan.account.entries}.values():
        layout.declare(entry.key, plan.dtypes[entry.key], entry.global_shape)

    def place(entry: Entry) -> tuple[str, int]:
        if not entry.sources:
            return "", 0
        first = reader.weights[entry.sources[0].name].tensor
        return str(first.file), first.start

    for entry in sorted(plan.account.entries, key=place):
        dtype, read = plan.dtypes[entry.key], [reader.weights[source.name].files for source in entry.sources]
        rows, columns = entry.shape[0], prod(entry.shape[1:])
        pieces = -(-rows * columns * dtype.size // CHUNK_BYTES)
        step = -(-rows // pieces)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            rest = (0,) * (len(entry.shape) - 1)
            sizes = ((1,) * len(entry.index)) + (count, *entry.shape[1:])
            operations = partial(target_operations, entry, dtype, reader, first, count)
            layout.chunk(entry.key, (*entry.index, first, *rest), sizes, operations, frozenset().union(*read))
    layout.put_objects(extra_states(plan.architecture), [None])
    return layout


def layout_te(plan: Import, reader: HfReader, states: Iterable[str]) -> tuple[WeightLayout, list[FilePlan]]:
    """The shards of TransformerEngine's form, layer after layer, with empty states of these names; and their files."""
    entries: dict[str, list[Entry]] = {}
    for entry in plan.account.entries:  # slices of a tensor in their order
        entries.setdefault(entry.key, []).append(entry)
    triples = [(key, plan.dtypes[key].safetensors, slices[0].global_shape) for key, slices in entries.items()]
    triples += [(name, STATE_TYPE, (0,)) for name in states]
    layout = default_layout(sorted(triples, key=lambda triple: _by_layer(triple[0])))

    def operations(tensor: TensorInfo) -> Iterator[CopyOperation]:
        for entry in entries.get(tensor.name, ()):
            yield from target_operations(entry, plan.dtypes[entry.key], reader, 0, entry.shape[0])

    def sources(tensor: TensorInfo) -> Iterable[Path]:
        names = [source.name for entry in entries.get(tensor.name, ()) for source in entry.sources]
        return [path for name in names for path in reader.weights[name].files]

    return layout, weight_files(layout, operations, sources)


def _by_layer(name: str) -> tuple[bool, int, str]:
    number = name.split(".", 2)[1] if name.startswith("layers.") else ""
    return (bool(number), int(number or 0), name)


COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


def target_operations(entry: Entry, dtype: Dtype, reader: HfReader, first: int, count: int) -> Iterator[CopyOperation]:
    """What makes rows of a Megatron tensor's slice, from its sources."""
    for segment in segments_of_target(entry.segments, first, count):
        if segment.source in (PADDING, ONES):
            filler = number(1 if segment.source == ONES else 0, dtype)
            yield from fill_value(filler, segment.rows * prod(entry.shape[1:]))
            continue
        source = entry.sources[segment.source]
        tensor = reader.weights[source.name].at(source.index)
        own, view = weight_dtype(tensor.dtype, tensor.name, tensor.place), tensor.view()
        operations: Iterable[CopyOperation]
        if entry.transposed and not tensor.transposed:
            rows = tensor.shape[0]
            parts = (TransposedRows(view=view, row=0, rows=rows, at=0),)
            limit = _limit(own, dtype)
            operations = transpose(parts, segment.source_row, segment.rows, rows, own.size, limit, segment.step)
        elif segment.step > 1:
            part = StridedView(view=view, first=segment.source_row, rows=segment.rows, step=segment.step)
            operations = copy_rows(part, 0, part.rows, _limit(own, dtype) // segment.step)
        else:
            operations = copy_rows(view, segment.source_row, segment.rows, _limit(own, dtype))
        if entry.zero_centered_gamma:
            place = f"{tensor.place}: {tensor.name}"
            operations = (
                AddConstant(operation=operation, number=-1.0, source=own, target=dtype, exact_name=place)
                for operation in operations
            )
            yield from operations
        else:
            yield from (cast_operation(operation, own, dtype) for operation in operations)


@dataclass(frozen=True, kw_only=True)
class Export:
    """How a Megatron checkpoint becomes a Hugging Face one."""

    architecture: Architecture
    layout: WeightLayout
    origin: dict[str, list[tuple[Entry, int]]]  # Hugging Face name -> the slices it is in, and as which source
    pass_through: dict[str, Weight]  # tensors that are no weights, kept in a file of their own
    components: dict[str, tuple[QuantizedWeight, Component]]  # codes and scales of weights written quantised, by name
    constants: tuple[Entry, ...]  # tensors of the form that the model has none of
    downcast: tuple[str, ...]  # tensors that are written in a narrower type than they are held in
    unit_rows: frozenset[str] = frozenset()  # tensors whose rows are divided by their lengths

    @property
    def bytes(self) -> int:
        """Bytes of weights to be written."""
        return sum(tensor.size for tensor in self.layout.tensors().values())


def plan_export(
    reader: FormReader,
    architecture: Architecture,
    table: Table,
    layout: WeightLayout | None,
    pass_through: Mapping[str, TensorInfo],
    dtype: Dtype | None,
    *,
    form: QuantizationScheme | None = None,
    quantized: bool = False,
) -> Export:
    """Match a checkpoint with its family's table and the shards it is to have.

    Args:
        reader: the checkpoint, of Megatron's or TransformerEngine's form.
        architecture: what hf/config.json says.
        table: its tensors, in that form.
        layout: the source's shards; None for transformers' default.
        pass_through: tensors kept beside the Megatron form.
        dtype: the type of every weight; None for the source's own, or where there is no layout the checkpoint's.
        form: how the source's weights were stored.
        quantized: whether they are to be stored so again, not as plain numbers.
    """
    stored = layout
    if layout is not None:
        layout = layout.plain(form)
    if layout is not None:
        table = table.with_prefixes_of(layout.tensors())
    entries = account_targets(table, reader.tensors, str(reader.directory), NOT_WEIGHTS)
    origin: dict[str, list[tuple[Entry, int]]] = {}
    for entry in entries:
        for place, source in enumerate(entry.sources):
            origin.setdefault(source.name, []).append((entry, place))
    for parts in origin.values():
        parts.sort(key=lambda part: part[0].sources[part[1]].index)  # slices, as the tensor has them
    shapes = {name: entry.sources[place].stored_shape for name, ((entry, place), *_) in origin.items()}
    held = {name: common(reader.tensors[entry.key].dtype for entry, _ in parts) for name, parts in origin.items()}
    if layout is None:
        types = {name: (FP32 if dtype is FP64 else dtype).safetensors for name, dtype in held.items()}
        triples = [(name, types[name], shapes[name]) for name in origin]
        triples += [(name, pass_through[name].dtype, shape) for name, shape in table.required_pass_through().items()]
        layout = default_layout(sorted(triples))
    names = layout.tensors()
    for tied in table.tied_tensors:
        if tied.name in names:
            origin[tied.name], shapes[tied.name] = origin[tied.tied_to], shapes[tied.tied_to]
            held[tied.name] = held[tied.tied_to]
    if absent := sorted(shapes.keys() - names.keys()):
        raise UserError(
            f"hf/weights.json has no place for {absent[0]}, which hf/config.json asks for; restore the file"
        )
    kept = assemble_weights(form, pass_through)
    if unknown := sorted(names.keys() - shapes.keys() - kept.keys()):
        raise UserError(f"hf/weights.json asks for {unknown[0]}, which is in no file; restore hf/ from the source")
    for name, shape in shapes.items():
        if names[name].shape != shape:
            raise UserError(
                f"hf/weights.json: {name} is {list(names[name].shape)}, hf/config.json asks for {list(shape)}"
            )
    if dtype is not None:
        layout = layout.with_dtypes(dict.fromkeys(shapes, dtype.safetensors))
    final = layout.tensors()
    kept = {name: weight for name, weight in kept.items() if name in final}

    def rounds(name: str) -> bool:
        written, own = (weight_dtype(of[name].dtype, name, "hf/weights.json") for of in (final, names))
        if any(
            entry.zero_centered_gamma for entry, _ in origin[name]
        ):  # exact as it was imported, and never after training
            return held[name] is not FP64 or common([written, own]) is not written
        return common([held[name], written]) is not written

    downcast = tuple(name for name in origin if rounds(name))
    components: dict[str, tuple[QuantizedWeight, Component]] = {}
    if stored is not None and quantized:
        for weight in assemble_weights(form, stored.tensors()).values():
            if weight.quantized and weight.name in origin:
                scaled = _with_scales(weight.quantized, pass_through)
                components |= {name: (scaled, component) for name, component in scaled.components.items()}
        layout, wanted = stored, stored.tensors().keys() - components.keys()
        kept = {name: Weight(tensor=tensor) for name, tensor in pass_through.items() if name in wanted}
    return Export(
        architecture=architecture,
        layout=layout,
        origin=origin,
        pass_through=kept,
        components=components,
        constants=tuple(entry for entry in entries if not entry.sources),
        downcast=downcast,
    )


def _with_scales(weight: QuantizedWeight, pass_through: Mapping[str, TensorInfo]) -> QuantizedWeight:
    """With the scales that were kept beside the weights."""
    for tensor in weight.companions:
        kept = pass_through.get(tensor.name)
        if kept is None or (kept.dtype, kept.shape) != (tensor.dtype, tensor.shape):
            raise UserError(f"{tensor.name} is not beside the weights as hf/weights.json has it; restore hf/")
    return replace(weight, scales=pass_through[weight.scales.name])


def named(tensors: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return f"{tensors[0]} and {len(tensors) - 1} more" if len(tensors) > 1 else tensors[0]


def changes_types(plan: Export, reader: FormReader) -> bool:
    """Whether a tensor is written in another type than it is held in."""
    tensors, kept = plan.layout.tensors(), plan.pass_through.values()
    held = ((name, reader.tensors[entry.key].dtype) for name, parts in plan.origin.items() for entry, _ in parts)
    changed = any(tensors[name].dtype != dtype.safetensors for name, dtype in held if name in tensors)
    return changed or bool(plan.components) or bool(plan.unit_rows) or any(weight.quantized for weight in kept)


def layout_export(plan: Export, reader: FormReader) -> list[FilePlan]:
    """The shards of an export."""

    def sources(tensor: TensorInfo) -> Iterable[Path]:
        if tensor.name in plan.pass_through:
            return plan.pass_through[tensor.name].files
        name, scales = tensor.name, frozenset[Path]()
        if tensor.name in plan.components:
            weight, _ = plan.components[tensor.name]
            name, scales = weight.name, frozenset([weight.scales.file])
        return scales.union(*(reader.files_of(entry.key, entry.index) for entry, _ in plan.origin[name]))

    return weight_files(plan.layout, lambda tensor: source_operations(plan, reader, tensor), sources)


def source_operations(plan: Export, reader: FormReader, tensor: TensorInfo) -> Iterator[CopyOperation]:
    """What makes a Hugging Face tensor, from those of the other form that it is in."""
    if tensor.name in plan.pass_through:
        aside = plan.pass_through[tensor.name].view()
        yield from copy_rows(aside, 0, aside.rows)
        return
    if tensor.name in plan.components:
        weight, component = plan.components[tensor.name]
        for index, numbers, held in _numbers(plan, reader, weight.name):
            yield from quantize(numbers, held, weight.at(index), component)
        return
    wanted = weight_dtype(tensor.dtype, tensor.name, tensor.place)
    for _, parts in groupby(plan.origin[tensor.name], key=lambda part: part[0].sources[part[1]].index):
        yield from _slice_operations(list(parts), reader, wanted, unit=tensor.name in plan.unit_rows)


def _slice_operations(
    origin: Sequence[tuple[Entry, int]], reader: FormReader, wanted: Dtype, *, unit: bool
) -> Iterator[CopyOperation]:
    """What makes a Hugging Face tensor, or a slice of one that holds all experts'; `unit`: each row divided by its length."""
    pieces = []
    for entry, place in origin:
        held, view = reader.tensors[entry.key].dtype, reader.view(entry.key, entry.index)
        segments, (rows, *columns) = segments_of_source(entry.segments, place), entry.sources[place].shape
        if entry.transposed:
            parts = tuple(
                TransposedRows(view=view, row=s.target_row, rows=s.rows, at=s.source_row, step=s.step) for s in segments
            )
            strips = transpose(parts, 0, rows, columns[0], held.size, _limit(held, wanted))
            yield from (cast_operation(operation, held, wanted) for operation in strips)
            return
        if any(segment.step > 1 for segment in segments):
            strided = _concatenated(entry, segments, view, rows)
            yield from (cast_operation(m, held, wanted) for m in copy_rows(strided, 0, rows, _limit(held, wanted) // 2))
            return
        pieces += [(segment, view, entry.zero_centered_gamma, held) for segment in segments]
    for segment, view, zero_centered_gamma, held in sorted(pieces, key=lambda piece: piece[0].source_row):
        limit = max(_limit(held, wanted), view.width if unit else 0)  # a row's length is known when all of it is read
        for operation in copy_rows(view, segment.target_row, segment.rows, limit):
            if unit:
                yield NormalizeRows(operation=operation, row=view.width // held.size, source=held, target=wanted)
            elif zero_centered_gamma:
                yield AddConstant(operation=operation, number=1.0, source=held, target=wanted)
            else:
                yield cast_operation(operation, held, wanted)


def _concatenated(entry: Entry, segments: Iterable[Segment], view: ByteView, rows: int) -> ConcatenatedView:
    """A source's rows, from where the entry has them."""
    parts = tuple(RowRange(view=view, row=s.target_row, rows=s.rows, at=s.source_row, step=s.step) for s in segments)
    return ConcatenatedView(name=entry.key, rows=rows, width=view.width, parts=parts)


def _numbers(plan: Export, reader: FormReader, name: str) -> Iterator[tuple[Shape, ByteView, Dtype]]:
    """Each slice of a weight to be quantised: its index, its values in the order of its codes, their dtype."""
    for index, origin in groupby(plan.origin[name], key=lambda part: part[0].sources[part[1]].index):
        parts: list[RowRange] = []
        held: set[Dtype] = set()
        for entry, place in origin:
            view = reader.view(entry.key, entry.index)
            held.add(reader.tensors[entry.key].dtype)
            shape = entry.sources[place].shape
            rows = shape[1] if entry.transposed else shape[0]
            parts += _concatenated(entry, segments_of_source(entry.segments, place), view, rows).parts
        if len(held) > 1:
            raise UserError(f"{reader.directory}: parts of {name} are of different types; leave out --quantized")
        yield index, ConcatenatedView(name=name, rows=rows, width=view.width, parts=tuple(parts)), held.pop()


def rows_to_quantize(plan: Export, reader: FormReader, name: str) -> Iterator[memoryview]:
    """What is held of a weight that is stored quantised, in bf16 and in the order of its codes."""
    with OpenFiles() as files:
        for _, numbers, held in _numbers(plan, reader, name):
            limit = _limit(held, BF16)
            yield from stream(
                (cast_operation(m, held, BF16) for m in copy_rows(numbers, 0, numbers.rows, limit)), files
            )


def constant_checks(plan: Export, reader: FormReader) -> list[Task]:
    """Reads of what the form holds though the model has none; each raises UserError where it is not as it was added."""
    return [partial(_check_constant, reader, entry) for entry in plan.constants]


def _check_constant(reader: FormReader, entry: Entry) -> None:
    if what := changed_constant(reader, entry):
        place = reader.tensors[entry.key].place
        raise UserError(f"{place}: {what}, and this model has none: it would be lost; train with it frozen")


def changed_constant(reader: FormReader, entry: Entry) -> str | None:
    """What to say of a tensor that the model has none of, where its numbers are not those that stand for nothing."""
    ones = entry.segments[0].source == ONES
    unit = number(1 if ones else 0, reader.tensors[entry.key].dtype)
    for block in reader.rows(entry.key, entry.index, 0, entry.shape[0]):
        if block != unit * (len(block) // len(unit)):
            return f"{entry.key} is not {'one' if ones else 'zero'}"
    return None


def source_rows(plan: Export, reader: FormReader, tensor: TensorInfo) -> Iterator[memoryview]:
    """Bytes of a Hugging Face tensor; each block is valid until the next one is asked for."""
    with OpenFiles() as files:
        yield from stream(source_operations(plan, reader, tensor), files)


def _limit(source: Dtype, target: Dtype) -> int:
    """Bytes to read at once, so that neither they nor what they become is more than a block."""
    return blocks.BLOCK * source.size // max(source.size, target.size)
