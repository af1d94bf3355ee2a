"""Plan of an export: Megatron or TransformerEngine tensors to Hugging Face shards.

All tensors are accounted for before the first byte is written. Each output byte is written once, in blocks: memory does
not grow with the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import ByteView, ConcatenatedView, RowRange
from shared.checkpoint.copy.operations import (
    AddConstant,
    CopyOperation,
    FilePlan,
    NormalizeRows,
    TransposedRows,
    cast_operation,
    copy_rows,
    stream,
    transpose,
)
from shared.checkpoint.copy.worker_pool import Task
from shared.checkpoint.dtypes import BF16, FP32, FP64, Dtype, common, scalar_bytes, weight_dtype
from shared.checkpoint.formats.hugging_face import WeightLayout, default_layout, weight_files
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.checkpoint.formats.torch_dist_reader import NON_WEIGHT_PREFIXES
from shared.errors import UserError
from shared.mapping.account import account_targets
from shared.mapping.layout import ONES, Segment, Shape, segments_of_source
from shared.mapping.rule import Entry, Table
from shared.quantized.scheme import QuantizationScheme
from shared.quantized.stored_weight import Component, QuantizedWeight, Weight, assemble_weights, quantize
from tools.convert.planning import MegatronReader, read_limit

Origin = list[tuple[Entry, int]]  # entries of a Hugging Face tensor, with its index in their sources


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Sources of a Hugging Face directory's tensors."""

    architecture: Architecture
    layout: WeightLayout
    origin: dict[str, Origin]  # by Hugging Face name
    pass_through: dict[str, Weight]  # tensors copied from hf/asides.safetensors
    components: dict[str, tuple[QuantizedWeight, Component]]  # codes and scales, by tensor name
    constants: tuple[Entry, ...]  # zeros or ones; not stored in Hugging Face
    downcast: tuple[str, ...]  # tensors written in a narrower dtype
    unit_rows: frozenset[str] = frozenset()  # tensors whose rows are divided by their L2 norms

    @property
    def bytes(self) -> int:
        """Bytes of weights to be written."""
        return sum(tensor.size for tensor in self.layout.tensors().values())

    @property
    def transposes(self) -> bool:
        """Whether any tensor is transposed."""
        return any(entry.transposed for origin in self.origin.values() for entry, _ in origin)

    def casts(self, reader: MegatronReader) -> bool:
        """Whether a dtype or a column order changes."""
        tensors = self.layout.tensors()
        held = (
            (name, reader.tensors[entry.key].dtype)
            for name, origin in self.origin.items()
            if name in tensors
            for entry, _ in origin
        )
        changed = any(tensors[name].dtype != dtype.safetensors for name, dtype in held)
        quantized = bool(self.components) or any(weight.quantized for weight in self.pass_through.values())
        return changed or quantized or bool(self.unit_rows) or reader.splits_columns


def plan_export(
    reader: MegatronReader,
    architecture: Architecture,
    table: Table,
    layout: WeightLayout | None,
    pass_through: Mapping[str, TensorInfo],
    dtype: Dtype | None,
    *,
    scheme: QuantizationScheme | None = None,
    quantized: bool = False,
) -> ExportPlan:
    """Match a checkpoint with the family's tensor table and the output shards.

    Args:
        reader: the Megatron or TransformerEngine checkpoint.
        architecture: architecture of hf/config.json.
        table: tensor table of the architecture, for the checkpoint's kind.
        layout: shard layout of the Hugging Face source; None for transformers' default.
        pass_through: tensors of hf/asides.safetensors.
        dtype: dtype of every weight; None: the source's, without a layout the checkpoint's.
        scheme: quantisation scheme of the source.
        quantized: requantise the weights that the source stored quantised.
    """
    stored = layout
    if layout is not None:
        layout = layout.dequantized(scheme)
        table = table.with_names_of(layout.tensors())
    entries = account_targets(table, reader.tensors, str(reader.directory), NON_WEIGHT_PREFIXES)
    origin = _origins(entries)
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
    kept = assemble_weights(scheme, pass_through)
    _check_layout(names, shapes, kept.keys())
    if dtype is not None:
        layout = layout.with_dtypes(dict.fromkeys(shapes, dtype.safetensors))
    final = layout.tensors()
    kept = {name: weight for name, weight in kept.items() if name in final}

    def narrows(name: str) -> bool:
        written, own = (weight_dtype(of[name].dtype, name, "hf/weights.json") for of in (final, names))
        if any(
            entry.zero_centered_gamma for entry, _ in origin[name]
        ):  # gamma is held in fp64: exact after import, rounded after training
            return held[name] is not FP64 or common([written, own]) is not written
        return common([held[name], written]) is not written

    downcast = tuple(name for name in origin if narrows(name))
    components: dict[str, tuple[QuantizedWeight, Component]] = {}
    if stored is not None and quantized:
        for weight in assemble_weights(scheme, stored.tensors()).values():
            if weight.quantized and weight.name in origin:
                scaled = _with_scales(weight.quantized, pass_through)
                components |= {name: (scaled, component) for name, component in scaled.components.items()}
        layout, wanted = stored, stored.tensors().keys() - components.keys()
        kept = {name: Weight(tensor=tensor) for name, tensor in pass_through.items() if name in wanted}
    return ExportPlan(
        architecture=architecture,
        layout=layout,
        origin=origin,
        pass_through=kept,
        components=components,
        constants=tuple(entry for entry in entries if not entry.sources),
        downcast=downcast,
    )


def _origins(entries: Iterable[Entry]) -> dict[str, Origin]:
    found: dict[str, Origin] = {}
    for entry in entries:
        for place, source in enumerate(entry.sources):
            found.setdefault(source.name, []).append((entry, place))
    for origin in found.values():
        origin.sort(key=lambda part: part[0].sources[part[1]].index)  # slices in the tensor's order
    return found


def _check_layout(names: Mapping[str, TensorInfo], shapes: Mapping[str, Shape], kept: Collection[str]) -> None:
    """UserError if the tensors of hf/weights.json are not the model's."""
    if absent := sorted(shapes.keys() - names.keys()):
        raise UserError(f"hf/weights.json lacks {absent[0]}, which hf/config.json asks for; restore the file")
    if unknown := sorted(names.keys() - shapes.keys() - set(kept)):
        raise UserError(f"hf/weights.json lists {unknown[0]}, which no file holds; restore hf/ from the source")
    for name, shape in shapes.items():
        if names[name].shape != shape:
            raise UserError(
                f"hf/weights.json: {name} is {list(names[name].shape)}, hf/config.json asks for {list(shape)}"
            )


def _with_scales(weight: QuantizedWeight, pass_through: Mapping[str, TensorInfo]) -> QuantizedWeight:
    """The weight with its scales from hf/asides.safetensors."""
    for tensor in weight.companions:
        kept = pass_through.get(tensor.name)
        if kept is None or (kept.dtype, kept.shape) != (tensor.dtype, tensor.shape):
            raise UserError(
                f"hf/asides.safetensors: {tensor.name} is missing, or differs from hf/weights.json; restore hf/"
            )
    return replace(weight, scales=pass_through[weight.scales.name])


def export_files(plan: ExportPlan, reader: MegatronReader) -> list[FilePlan]:
    """The output shards."""

    def sources(tensor: TensorInfo) -> Iterable[Path]:
        if tensor.name in plan.pass_through:
            return plan.pass_through[tensor.name].files
        name, scales = tensor.name, frozenset[Path]()
        if tensor.name in plan.components:
            weight, _ = plan.components[tensor.name]
            name, scales = weight.name, frozenset([weight.scales.file])
        return scales.union(*(reader.files_of(entry.key, entry.index) for entry, _ in plan.origin[name]))

    return weight_files(plan.layout, lambda tensor: tensor_operations(plan, reader, tensor), sources)


def tensor_operations(plan: ExportPlan, reader: MegatronReader, tensor: TensorInfo) -> Iterator[CopyOperation]:
    """Copy operations of a Hugging Face tensor."""
    if tensor.name in plan.pass_through:
        view = plan.pass_through[tensor.name].view()
        yield from copy_rows(view, 0, view.rows)
        return
    if tensor.name in plan.components:
        weight, component = plan.components[tensor.name]
        for index, numbers, held in _rows_to_quantize(plan, reader, weight.name):
            yield from quantize(numbers, held, weight.at(index), component)
        return
    wanted = weight_dtype(tensor.dtype, tensor.name, tensor.place)
    for _, origin in groupby(plan.origin[tensor.name], key=lambda part: part[0].sources[part[1]].index):
        yield from _slice_operations(list(origin), reader, wanted, unit=tensor.name in plan.unit_rows)


def _slice_operations(origin: Origin, reader: MegatronReader, wanted: Dtype, *, unit: bool) -> Iterator[CopyOperation]:
    """Copy operations of a tensor or of one expert's slice; with `unit`, each row is divided by its L2 norm."""
    pieces = []
    for entry, place in origin:
        held, view = reader.tensors[entry.key].dtype, reader.view(entry.key, entry.index)
        segments, (rows, *columns) = segments_of_source(entry.segments, place), entry.sources[place].shape
        limit = read_limit(held, wanted)
        if entry.transposed:
            parts = tuple(
                TransposedRows(view=view, row=s.target_row, rows=s.rows, column=s.source_row, step=s.step)
                for s in segments
            )
            strips = transpose(parts, 0, rows, columns[0], held.size, limit)
            yield from (cast_operation(operation, held, wanted) for operation in strips)
            return
        if any(segment.step > 1 for segment in segments):
            joined = _concatenated(entry, segments, view, rows)
            yield from (cast_operation(operation, held, wanted) for operation in copy_rows(joined, 0, rows, limit // 2))
            return
        pieces += [(segment, view, entry.zero_centered_gamma, held) for segment in segments]
    for segment, view, zero_centered_gamma, held in sorted(pieces, key=lambda piece: piece[0].source_row):
        limit = max(read_limit(held, wanted), view.width if unit else 0)  # the L2 norm needs the full row
        for operation in copy_rows(view, segment.target_row, segment.rows, limit):
            if unit:
                yield NormalizeRows(operation=operation, row=view.width // held.size, source=held, target=wanted)
            elif zero_centered_gamma:
                yield AddConstant(operation=operation, constant=1.0, source=held, target=wanted)
            else:
                yield cast_operation(operation, held, wanted)


def _concatenated(entry: Entry, segments: Iterable[Segment], view: ByteView, rows: int) -> ConcatenatedView:
    """A source's rows in order, read from the entry's view."""
    parts = tuple(
        RowRange(view=view, row=s.target_row, rows=s.rows, target_row=s.source_row, step=s.step) for s in segments
    )
    return ConcatenatedView(name=entry.key, rows=rows, width=view.width, parts=parts)


def _rows_to_quantize(plan: ExportPlan, reader: MegatronReader, name: str) -> Iterator[tuple[Shape, ByteView, Dtype]]:
    """Per slice of a weight to be quantised: index, view with rows in the order of the codes, dtype."""
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
            raise UserError(f"{reader.directory}: slices of {name} have different dtypes; leave out --quantized")
        yield index, ConcatenatedView(name=name, rows=rows, width=view.width, parts=tuple(parts)), held.pop()


def exported_rows(plan: ExportPlan, reader: MegatronReader, tensor: TensorInfo) -> Iterator[memoryview]:
    """Bytes of a Hugging Face tensor; a block is valid until the next is requested."""
    with OpenFiles() as files:
        yield from stream(tensor_operations(plan, reader, tensor), files)


def rows_to_quantize(plan: ExportPlan, reader: MegatronReader, name: str) -> Iterator[memoryview]:
    """Values of a weight to be quantised, in bf16 and in the order of the codes."""
    with OpenFiles() as files:
        for _, numbers, held in _rows_to_quantize(plan, reader, name):
            operations = copy_rows(numbers, 0, numbers.rows, read_limit(held, BF16))
            yield from stream((cast_operation(operation, held, BF16) for operation in operations), files)


def constant_checks(plan: ExportPlan, reader: MegatronReader) -> list[Task]:
    """One check per constant; UserError if training changed it."""
    return [partial(_check_constant, reader, entry) for entry in plan.constants]


def _check_constant(reader: MegatronReader, entry: Entry) -> None:
    if what := changed_constant(reader, entry):
        place = reader.tensors[entry.key].place
        raise UserError(
            f"{place}: {what}, but the model has no such parameter: its values would be lost; freeze it in training"
        )


def changed_constant(reader: MegatronReader, entry: Entry) -> str | None:
    """`KEY is not zero` (or one) if a constant has other values, else None."""
    ones = entry.segments[0].source == ONES
    wanted = scalar_bytes(1 if ones else 0, reader.tensors[entry.key].dtype)
    for block in reader.rows(entry.key, entry.index, 0, entry.shape[0]):
        if block != wanted * (len(block) // len(wanted)):
            return f"{entry.key} is not {'one' if ones else 'zero'}"
    return None
