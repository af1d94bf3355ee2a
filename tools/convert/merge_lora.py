"""`convert merge-lora`: a PEFT LoRA adapter merged into its base, a Hugging Face directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy.blocks import BLOCK, OpenFiles
from shared.checkpoint.copy.byte_view import view_of
from shared.checkpoint.copy.operations import CopyOperation, cast_operation, copy_rows
from shared.checkpoint.copy.worker_pool import Task
from shared.checkpoint.directory.auxiliary_files import check_auxiliary_files, copy_auxiliary_files, read_config
from shared.checkpoint.directory.model_card import Stage, write_card
from shared.checkpoint.directory.open import content_checks, open_checkpoint
from shared.checkpoint.directory.peft_config import AdapterConfig
from shared.checkpoint.directory.publish import publish
from shared.checkpoint.dtypes import Dtype, weight_dtype
from shared.checkpoint.formats.hugging_face import HfReader, WeightLayout, weight_files, write_index
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.checkpoint.lora.match import Changes, match, read_adapter, vocabulary_rows
from shared.checkpoint.lora.merge_adapter import merged_tensor
from shared.checkpoint.lora.peft_files import TOKENIZER_FILES
from shared.cli import log
from shared.errors import UserError
from shared.families import registry
from shared.families.common.multimodal_wrapper import untied as untied_config
from shared.invocation import invocation
from shared.mapping.rule import Table
from tools.convert.conversion import run_conversion
from tools.convert.hf_files import remove_quantization_config
from tools.convert.hf_source import source_architecture
from tools.convert.plan_import import plan_import, tied_checks
from tools.convert.tokenizer_files import check_same_vocabulary

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
        base = registry.table_of(architecture)
        plan = plan_import(reader, architecture, base)
        stored, passed_over = read_adapter(adapter), ignored.get("ignored_config_fields", ())
        prefix_variants, table = base.prefix_variants, base.with_names_of(reader.tensors)
        rows = vocabulary_rows(config, stored, table, prefix_variants) or architecture.vocab_size
        resized = rows != architecture.vocab_size
        if resized:
            log(f"vocab_size: {rows}, as the adapter's embedding; the base's is {architecture.vocab_size}")
            architecture = _resized_architecture(reader, architecture, rows, passed_over)
            table = registry.table_of(architecture).with_names_of(reader.tensors)
        changes = match(config, stored, table, prefix_variants)
        merge = _plan(reader, changes, table, passed_over)
        _log_merge(config, changes, merge)
        check_same_vocabulary(adapter, source, rows)

        def checks(sources: frozenset[Path]) -> list[Task]:
            tied = [*tied_checks(plan, reader), *merge.tied_checks()]
            return [*content_checks(checkpoint, sources, flag="--source"), *tied]

        run_conversion(
            "merge-lora",
            architecture,
            out,
            weight_files(merge.layout, merge.operations, merge.sources),
            target,
            workers=workers,
            transposes=False,
            casts=True,
            checks=checks,
            memory_per_worker=8 * BLOCK
            + max((delta.bytes_held for each in changes.deltas.values() for delta in each), default=0),
        )
        write_index(out.path, merge.layout)
        if own := [name for name in TOKENIZER_FILES if (adapter / name).is_file()]:
            log(f"from the adapter: {', '.join(own)}")
            for name in own:
                shutil.copyfile(adapter / name, out.path / name)
        copy_auxiliary_files(source, out.path)
        remove_quantization_config(out.path / "config.json")
        if merge.untied:
            _rewrite(out.path / "config.json", untied_config)
        if resized:
            _rewrite(out.path / "config.json", partial(_resized_config, rows=rows))
        config_json = registry.with_auxiliary_fields(read_config(out.path / "config.json"), out.path)
        architecture = registry.from_config(config_json, passed_over)
        write_card(out.path, Stage.of_this(invocation(), inputs, {}), name=target.name, adapter=adapter)
        out.describe(
            family=architecture.family,
            architecture=architecture.to_dict(),
            dtype=sorted({tensor.dtype for tensor in merge.layout.tensors().values()}),
            tensors=len(merge.layout.tensors()),
            parameters=architecture.parameter_count(),
            adapter_base=config.base,
            adapted=len(merge.changed),
            **ignored,
        )


def _plan(reader: HfReader, changes: Changes, table: Table, ignored: Collection[str]) -> Merge:
    shapes = {source.name: source.shape for entry in table.entries() if entry.padded for source in entry.sources}
    shapes |= {tied.name: shapes[tied.tied_to] for tied in table.tied_tensors if tied.tied_to in shapes}
    layout, untied = reader.layout, None
    if any(tensor.shape != shapes.get(name, tensor.shape) for name, tensor in layout.tensors().items()):
        layout = layout.with_shapes(shapes)
    partners: dict[str, str] = {}
    for tied in (tied for tied in table.tied_tensors if not tied.always):
        partners |= {tied.name: tied.tied_to, tied.tied_to: tied.name}
        if {*changes.deltas, *changes.replaced} & {tied.name, tied.tied_to}:
            untied = tied.name, tied.tied_to
            if tied.name not in layout.tensors():
                embedding = layout.tensors()[tied.tied_to]
                layout = layout.with_tensor(tied.name, embedding.dtype, embedding.shape)
    if untied:
        # UserError if the family cannot be untied
        registry.from_config(registry.with_auxiliary_fields(untied_config(reader.config), reader.path), ignored)
    apart = untied[0] if untied else None
    copies = {tied.name: tied.tied_to for tied in table.tied_tensors if tied.name != apart}
    return Merge(reader=reader, changes=changes, layout=layout, untied=untied, copies=copies, partners=partners)


def _resized_config(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """config.json with another number of tokens, in `text_config` of a multimodal one."""
    if "text_config" in config:
        return {**config, "text_config": _resized_config(config["text_config"], rows)}
    return {
        **config,
        **{name: rows for name in ("vocab_size", "padded_vocab_size") if name in config},
        "vocab_size": rows,
    }


def _resized_architecture(
    reader: HfReader, architecture: Architecture, rows: int, ignored: Collection[str]
) -> Architecture:
    """The architecture with another number of tokens; UserError if the family's config.json does not have it."""
    config = registry.with_auxiliary_fields(_resized_config(reader.config, rows), reader.path)
    found = registry.from_config(config, ignored).vocab_size
    if found != rows:
        raise UserError(
            f"--source {reader.path}: the adapter has {rows} tokens, which this family's config.json cannot say; merge it with "
            "peft"
        )
    return replace(architecture, vocab_size=rows)


def _log_merge(config: AdapterConfig, changes: Changes, merge: Merge) -> None:
    log(f"adapter of {config.base or 'an unnamed base'}; changes {len(merge.changed)} tensors")
    if merge.untied:
        head, embedding = merge.untied
        log(f"{head} and {embedding}: untied, as in the adapter's training; config.json: tie_word_embeddings is false")
    for name, tensor in {**changes.wrapped, **changes.replaced}.items():
        wanted = merge.layout.tensors()[merge.copies.get(name, name)].dtype
        if tensor.dtype != wanted:
            log(f"{name}: cast from the adapter's {tensor.dtype} to the base's {wanted}")


def _rewrite(path: Path, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    path.write_text(json.dumps(change(read_config(path)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Plan of the merge: where each tensor comes from."""

    reader: HfReader
    changes: Changes
    layout: WeightLayout
    untied: tuple[str, str] | None  # (head, embedding), stored separately after the merge
    copies: Mapping[str, str]  # stored tied tensors: name -> original
    partners: Mapping[str, str]  # head and embedding that config.json of the base ties: each other's name

    @property
    def changed(self) -> set[str]:
        """Names of the tensors that differ from the base's."""
        return {self.copies.get(name, name) for name in self.changes.names}

    def operations(self, tensor: TensorInfo) -> Iterator[CopyOperation]:
        """Copy operations of a tensor."""
        name = self.copies.get(tensor.name, tensor.name)
        whole = self._whole(name)
        held, dtype = (weight_dtype(t.dtype, t.name, t.place) for t in (whole, tensor))
        if trained := self.changes.rows.get(name):
            yield from _with_rows(whole, *trained, dtype)
        elif deltas := self.changes.deltas.get(name):
            yield from merged_tensor(whole, dtype, deltas)
        else:
            yield from _cast_rows(whole, 0, view_of(whole).rows, held, dtype)

    def sources(self, tensor: TensorInfo) -> Iterator[Path]:
        """Source files of a tensor."""
        name = self.copies.get(tensor.name, tensor.name)
        yield self._whole(name).file
        for delta in self.changes.deltas.get(name, ()):
            yield delta.a.file
        if trained := self.changes.rows.get(name):
            yield trained[1].file

    def _whole(self, name: str) -> TensorInfo:
        """The tensor that LoRA and trained rows are added to, or that replaces the base's."""
        places = (name, self.partners[name]) if name in self.partners else (name,)
        known = [self.changes.replaced.get(name), *map(self.changes.wrapped.get, places)]
        found = next((tensor for tensor in known if tensor), None)
        return found or next(self.reader.tensors[place] for place in places if place in self.reader.tensors)

    def tied_checks(self) -> list[Task]:
        """One check per tied pair that the adapter holds twice; UserError if they differ."""
        pairs = [(name, of) for name, of in self.copies.items() if {name, of} <= self.changes.wrapped.keys()]
        return [partial(_check_same, *(self.changes.wrapped[name] for name in pair)) for pair in pairs]


def _check_same(one: TensorInfo, other: TensorInfo) -> None:
    with OpenFiles() as files:
        blocks = (view_of(tensor).blocks(files, 0, tensor.shape[0]) for tensor in (one, other))
        if one.dtype != other.dtype or any(a != b for a, b in zip(*blocks, strict=True)):
            raise UserError(
                f"{one.place}: {one.name} differs from {other.name}, but the base ties them; merge into the base that it was "
                "trained on"
            )


def _cast_rows(tensor: TensorInfo, first: int, count: int, held: Dtype, dtype: Dtype) -> Iterator[CopyOperation]:
    if held is dtype:
        yield from copy_rows(view_of(tensor), first, count)
        return
    limit = BLOCK * held.size // max(held.size, dtype.size)
    yield from (cast_operation(operation, held, dtype) for operation in copy_rows(view_of(tensor), first, count, limit))


def _with_rows(base: TensorInfo, rows: Mapping[int, int], trained: TensorInfo, dtype: Dtype) -> Iterator[CopyOperation]:
    """Copy operations of the base tensor with rows replaced: base row -> row of `trained`."""
    held, new = (weight_dtype(tensor.dtype, tensor.name, tensor.place) for tensor in (base, trained))
    first = 0
    for row, place in sorted(rows.items()):
        yield from _cast_rows(base, first, row - first, held, dtype)
        yield from _cast_rows(trained, place, 1, new, dtype)
        first = row + 1
    yield from _cast_rows(base, first, base.shape[0] - first, held, dtype)
