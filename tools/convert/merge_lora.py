"""`convert merge-lora`: a PEFT LoRA adapter merged into its base, a Hugging Face directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.checkpoint.copy.blocks import BLOCK
from shared.checkpoint.copy.byte_view import view_of
from shared.checkpoint.copy.operations import CopyOperation, cast_operation, copy_rows
from shared.checkpoint.copy.worker_pool import Task
from shared.checkpoint.directory.auxiliary_files import check_auxiliary_files, copy_auxiliary_files, read_config
from shared.checkpoint.directory.open import content_checks, open_checkpoint
from shared.checkpoint.directory.publish import publish
from shared.checkpoint.dtypes import weight_dtype
from shared.checkpoint.formats.hugging_face import HfReader, WeightLayout, weight_files, write_index
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.cli import log
from shared.errors import UserError
from shared.families import registry
from shared.families.common.multimodal_wrapper import untied as untied_config
from shared.mapping.rule import Table
from tools.convert.adapter import Changes, match, read_adapter
from tools.convert.adapter_config import AdapterConfig
from tools.convert.conversion import run_conversion
from tools.convert.hf_files import remove_quantization_config
from tools.convert.hf_source import source_architecture
from tools.convert.lora import Matrix, merged
from tools.convert.plan_import import plan_import, tied_checks
from tools.convert.tokenizer_files import FILES, check_same_vocabulary

_MATRIX_THREADS = "OPENBLAS_NUM_THREADS"  # BLAS threads per copy thread


def run(
    source: Path,
    adapter: Path,
    target: Path,
    ignore_config_field: tuple[str, ...],
    overwrite: bool,
    workers: int | None,
) -> None:
    """Merge; publishes `target` of kind hf."""
    os.environ.setdefault(_MATRIX_THREADS, "1")  # before numpy is imported
    inputs = {"source": source, "adapter": adapter}
    with publish(target, kind="hf", inputs=inputs, overwrite=overwrite, resumable=True) as out:
        checkpoint = open_checkpoint(source, kinds=("hf",), flag="--source", verify="small")
        check_auxiliary_files(adapter, "--adapter")
        reader, config = HfReader(source), AdapterConfig(adapter)
        if reader.scheme:
            raise UserError(
                f"--source {source} is quantised; dequantise it first with `convert to-megatron` and `to-hf`"
            )
        declared, ignored = source_architecture(reader, source, ignore_config_field)
        architecture = registry.drop_missing_mtp(declared, reader.weights)
        table = registry.table_of(architecture)
        plan = plan_import(reader, architecture, table)
        prefix_variants, table = table.prefix_variants, table.with_names_of(reader.tensors)
        changes = match(config, read_adapter(adapter), table, prefix_variants)
        merge = _plan(reader, changes, table, ignored.get("ignored_config_fields", ()))
        _log_merge(config, changes, merge)
        check_same_vocabulary(adapter, source, plan.architecture.vocab_size)

        def checks(sources: frozenset[Path]) -> list[Task]:
            return [*content_checks(checkpoint, sources, flag="--source"), *tied_checks(plan, reader)]

        run_conversion(
            "merge-lora",
            plan.architecture,
            out,
            weight_files(merge.layout, merge.operations, merge.sources),
            target,
            workers=workers,
            transposes=False,
            casts=True,
            checks=checks,
            memory_per_worker=8 * BLOCK + max((delta.bytes_held for delta in changes.deltas.values()), default=0),
        )
        write_index(out.path, merge.layout)
        if own := [name for name in FILES if (adapter / name).is_file()]:
            log(f"from the adapter: {', '.join(own)}")
            for name in own:
                shutil.copyfile(adapter / name, out.path / name)
        copy_auxiliary_files(source, out.path)
        remove_quantization_config(out.path / "config.json")
        if merge.untied:
            _untie(out.path / "config.json")
        config_json = registry.with_auxiliary_fields(read_config(out.path / "config.json"), out.path)
        architecture = registry.from_config(config_json, ignored.get("ignored_config_fields", ()))
        out.describe(
            family=architecture.family,
            architecture=architecture.to_dict(),
            dtype=sorted({tensor.dtype for tensor in merge.layout.tensors().values()}),
            tensors=len(merge.layout.tensors()),
            parameters=architecture.parameter_count(),
            adapter_base=config.base,
            adapted=len(changes.names),
            **ignored,
        )


def _plan(reader: HfReader, changes: Changes, table: Table, ignored: Collection[str]) -> Merge:
    layout, untied = reader.layout, None
    for tied in (tied for tied in table.tied_tensors if not tied.always):
        if (changes.names - changes.rows.keys()) & {tied.name, tied.tied_to}:
            untied = tied.name, tied.tied_to
            if tied.name not in layout.tensors():
                embedding = reader.tensors[tied.tied_to]
                layout = layout.with_tensor(tied.name, embedding.dtype, embedding.shape)
    if untied:
        # UserError if the family cannot be untied
        registry.from_config(registry.with_auxiliary_fields(untied_config(reader.config), reader.path), ignored)
    copies = {tied.name: tied.tied_to for tied in table.tied_tensors if tied.always or tied.tied_to in changes.rows}
    return Merge(reader=reader, changes=changes, layout=layout, untied=untied, copies=copies)


def _log_merge(config: AdapterConfig, changes: Changes, merge: Merge) -> None:
    log(f"adapter of {config.base or 'an unnamed base'}; changes {len(changes.names)} tensors")
    if merge.untied:
        head, embedding = merge.untied
        log(f"{head} and {embedding}: untied, as in the adapter's training; config.json: tie_word_embeddings is false")
    for name, tensor in changes.replaced.items():
        wanted = merge.layout.tensors()[name].dtype
        if tensor.dtype != wanted:
            log(f"{name}: cast from the adapter's {tensor.dtype} to the base's {wanted}")


def _untie(path: Path) -> None:
    config = untied_config(read_config(path))
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Plan of the merge: where each tensor comes from."""

    reader: HfReader
    changes: Changes
    layout: WeightLayout
    untied: tuple[str, str] | None  # (head, embedding), stored separately after the merge
    copies: Mapping[str, str]  # stored tied tensors: name -> original

    def operations(self, tensor: TensorInfo) -> Iterator[CopyOperation]:
        """Copy operations of a tensor."""
        name = self.copies.get(tensor.name, tensor.name)
        base = self._base(name)
        if name not in self.changes.names:
            view = view_of(base)
            yield from copy_rows(view, 0, view.rows)
            return
        replacement = self.changes.replaced.get(name, base)
        held, dtype = (weight_dtype(t.dtype, t.name, t.place) for t in (replacement, base))
        if trained := self.changes.rows.get(name):
            yield from _with_rows(base, *trained)
        elif delta := self.changes.deltas.get(name):
            yield from merged(Matrix(view=view_of(replacement), stored=held, dtype=dtype), delta)
        else:
            limit = BLOCK * held.size // max(held.size, dtype.size)
            for operation in copy_rows(view_of(replacement), 0, replacement.shape[0], limit):
                yield cast_operation(operation, held, dtype)

    def sources(self, tensor: TensorInfo) -> Iterator[Path]:
        """Source files of a tensor."""
        name = self.copies.get(tensor.name, tensor.name)
        yield self._base(name).file
        if replacement := self.changes.replaced.get(name):
            yield replacement.file
        if delta := self.changes.deltas.get(name):
            yield delta.a.file
        if trained := self.changes.rows.get(name):
            yield trained[1].file

    def _base(self, name: str) -> TensorInfo:
        if self.untied and name == self.untied[0] and name not in self.reader.tensors:
            name = self.untied[1]
        return self.reader.tensors[name]


def _with_rows(base: TensorInfo, rows: Mapping[int, int], trained: TensorInfo) -> Iterator[CopyOperation]:
    """Copy operations of the base tensor with rows replaced: base row -> row of `trained`."""
    view, new = view_of(base), view_of(trained)
    dtypes = [weight_dtype(tensor.dtype, tensor.name, tensor.place) for tensor in (trained, base)]
    limit = BLOCK * dtypes[0].size // max(dtype.size for dtype in dtypes)
    first = 0
    for row, place in sorted(rows.items()):
        yield from copy_rows(view, first, row - first)
        yield from (cast_operation(operation, *dtypes) for operation in copy_rows(new, place, 1, limit))
        first = row + 1
    yield from copy_rows(view, first, view.rows - first)
