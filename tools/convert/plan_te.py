"""Plan of an import to TransformerEngine parameters: safetensors shards in layer order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from shared.checkpoint.copy.operations import CopyOperation, FilePlan
from shared.checkpoint.formats.hugging_face import HfReader, WeightLayout, default_layout, weight_files
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.checkpoint.formats.transformer_engine_reader import STATE_TYPE
from shared.mapping.rule import Entry
from tools.convert.plan_import import ImportPlan
from tools.convert.planning import entry_operations


def te_layout(plan: ImportPlan, reader: HfReader, states: Iterable[str]) -> tuple[WeightLayout, list[FilePlan]]:
    """Shard layout and file plans; `states` are the names of empty `_extra_state` tensors."""
    entries: dict[str, list[Entry]] = {}
    for entry in plan.account.entries:  # slices of a tensor, in order
        entries.setdefault(entry.key, []).append(entry)
    triples = [(key, plan.dtypes[key].safetensors, slices[0].global_shape) for key, slices in entries.items()]
    triples += [(name, STATE_TYPE, (0,)) for name in states]
    layout = default_layout(sorted(triples, key=lambda triple: _by_layer(triple[0])))

    def operations(tensor: TensorInfo) -> Iterator[CopyOperation]:
        for entry in entries.get(tensor.name, ()):
            yield from entry_operations(entry, plan.dtypes[entry.key], reader, 0, entry.shape[0])

    def sources(tensor: TensorInfo) -> Iterable[Path]:
        names = [source.name for entry in entries.get(tensor.name, ()) for source in entry.sources]
        return [path for name in names for path in reader.weights[name].files]

    return layout, weight_files(layout, operations, sources)


def _by_layer(name: str) -> tuple[bool, int, str]:
    number = name.split(".", 2)[1] if name.startswith("layers.") else ""
    return (bool(number), int(number or 0), name)
