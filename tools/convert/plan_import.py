"""Plan of an import: Hugging Face tensors to torch_dist chunks.

All tensors are accounted for before the first byte is written. Each source byte is read once and each output byte written
once, in blocks: memory does not grow with the model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy.worker_pool import Task
from shared.checkpoint.directory.open import Checkpoint, content_checks
from shared.checkpoint.directory.publish import Checks, Publication
from shared.checkpoint.directory.sharded_publish import ShardSpec
from shared.checkpoint.dtypes import FP64, Dtype, common, weight_dtype
from shared.checkpoint.formats.hugging_face import HfReader
from shared.checkpoint.formats.torch_dist_writer import CHUNK_BYTES, TorchDistLayout
from shared.cli import log
from shared.console import abbreviated
from shared.errors import UserError
from shared.mapping.account import Account, account_sources
from shared.mapping.extra_states import extra_states
from shared.mapping.rule import Entry, Table, TiedTensor
from tools.convert.planning import entry_operations

# Content of common.pt as written by Megatron-Core up to 0.18; later versions read it too.
COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """Targets of a Hugging Face checkpoint's tensors."""

    architecture: Architecture
    account: Account
    dtypes: dict[str, Dtype]  # by Megatron key
    upcast: tuple[str, ...]  # keys whose slices differ in dtype: stored in a common, wider one

    @property
    def bytes(self) -> int:
        """Bytes of weights to be written."""
        return sum(prod(entry.shape) * self.dtypes[entry.key].size for entry in self.account.entries)

    @property
    def transposes(self) -> bool:
        """Whether any tensor is transposed."""
        return any(entry.transposed for entry in self.account.entries)

    def casts(self, reader: HfReader) -> bool:
        """Whether a dtype or a column order changes."""
        shifted = any(entry.zero_centered_gamma for entry in self.account.entries)
        quantized = any(weight.quantized for weight in reader.weights.values())
        return bool(self.upcast) or shifted or quantized or reader.splits_columns


def plan_import(reader: HfReader, architecture: Architecture, table: Table) -> ImportPlan:
    """Match a checkpoint with the family's tensor table.

    Raises:
        UserError: a tensor is missing, unknown or misshapen, or its dtype is not a weight dtype.
    """
    account = account_sources(table, reader.weights, str(reader.path))
    found: dict[str, set[Dtype]] = {}
    zero_centered_gamma = {entry.key for entry in account.entries if entry.zero_centered_gamma}
    for entry in account.entries:
        for source in entry.sources:
            tensor = reader.weights[source.name]
            found.setdefault(entry.key, set()).add(weight_dtype(tensor.dtype, source.name, tensor.place))
    most = Counter(dtype for dtypes in found.values() for dtype in dtypes).most_common(1)[0][0]
    for entry in account.entries:
        if not entry.sources:  # a constant: dtype of the module's weight, if it has one
            found[entry.key] = found.get(entry.key.removesuffix("bias") + "weight", {most})
    return ImportPlan(
        architecture=architecture,
        account=account,
        dtypes={key: FP64 if key in zero_centered_gamma else common(dtypes) for key, dtypes in found.items()},
        upcast=tuple(key for key, dtypes in found.items() if len(dtypes) > 1),
    )


def log_import(plan: ImportPlan, reader: HfReader) -> None:
    """Log upcasts, dequantisation and pass-through tensors."""
    if plan.upcast:
        names = ", ".join(plan.upcast)
        log(f"{names}: slices of different dtypes, upcast to float32; to-hf writes the original dtypes")
    if pass_through := plan.account.pass_through:
        log(f"{abbreviated(pass_through)}: pass-through tensors, kept in hf/ and not trained")
    if reader.leftover:
        log(f"config.json: quantization_config ({reader.leftover}) ignored, no weight is quantised")
    if quantized := [weight.quantized for weight in reader.weights.values() if weight.quantized]:
        log(f"{len(quantized)} weights dequantised from {quantized[0].scheme.title} to bfloat16; scales kept in hf/")


def import_checks(checkpoint: Checkpoint, plan: ImportPlan, reader: HfReader, shard: ShardSpec | None) -> Checks:
    """Checks of the source during the copy: file hashes; in the first shard also tied tensors stored twice."""

    def checks(sources: frozenset[Path]) -> list[Task]:
        tied = tied_checks(plan, reader) if shard is None or shard.index == 1 else []
        return [*content_checks(checkpoint, sources, flag="--source"), *tied]

    return checks


def describe_import(out: Publication, plan: ImportPlan, checkpoint: Checkpoint, **facts: Any) -> None:
    """Record the model in the manifest, and which of the source's weights were not read, with further facts."""
    if checkpoint.ignored:
        out.describe(ignored=list(checkpoint.ignored))
    out.describe(
        family=plan.architecture.family,
        architecture=plan.architecture.to_dict(),
        dtype=sorted({dtype.name for dtype in plan.dtypes.values()}),
        tensors=len(plan.dtypes),
        parameters=plan.architecture.parameter_count(),
        **facts,
    )


def tied_checks(plan: ImportPlan, reader: HfReader) -> list[Task]:
    """One check per tied tensor stored twice; UserError if the copies differ."""
    return [partial(_check_tied, reader, tied) for tied in plan.account.tied_tensors]


def _check_tied(reader: HfReader, tied: TiedTensor) -> None:
    name, of = tied.name, tied.tied_to
    same = reader.weights[name].dtype == reader.weights[of].dtype
    if not same or any(a != b for a, b in zip(reader.values(name), reader.values(of), strict=True)):
        reason, fix = "config.json ties them", f"set tie_word_embeddings to false, or remove {name}"
        if tied.always:
            reason, fix = "the family ties them", f"remove {name}"
        raise UserError(f"{reader.weights[name].place}: {name} differs from {of}, but {reason}; {fix}")


def torch_dist_layout(plan: ImportPlan, reader: HfReader) -> TorchDistLayout:
    """Chunks of every tensor, and the `_extra_state` objects required by a strict load.

    Chunks are in the order of their sources on disk, so each output file reads few source files.
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
        chunks = -(-rows * columns * dtype.size // CHUNK_BYTES)
        step = -(-rows // chunks)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            rest = (0,) * (len(entry.shape) - 1)
            sizes = ((1,) * len(entry.index)) + (count, *entry.shape[1:])
            operations = partial(entry_operations, entry, dtype, reader, first, count)
            layout.add_chunk(entry.key, (*entry.index, first, *rest), sizes, operations, frozenset().union(*read))
    layout.add_objects(extra_states(plan.architecture), [None])
    return layout
