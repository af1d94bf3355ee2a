"""What goes beside a model's weights in another form, so that the way back gives the same Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy.engine import Task
from shared.checkpoint.directory.auxiliary_files import copy_passengers, other_weights
from shared.checkpoint.directory.open import Checkpoint, content_checks
from shared.checkpoint.directory.publish import Checks, Publication
from shared.checkpoint.directory.sharded_publish import Shard
from shared.checkpoint.formats.hugging_face import LAYOUT, HfReader, WeightLayout, default_layout, write_weights
from shared.checkpoint.formats.safetensors_file import TensorInfo, read_header
from shared.cli import log
from shared.errors import UserError
from shared.families import registry
from shared.mapping.rule import Table
from tools.convert.transfer import Import, named, tied_checks

PASS_THROUGH_FILE = "asides.safetensors"


def announce(plan: Import, reader: HfReader) -> None:
    """Say what is not simply carried over."""
    if plan.upcast:
        names = ", ".join(plan.upcast)
        log(f"{names}: parts of different types are held in float32, and written back as they were")
    if pass_through := plan.account.pass_through:
        log(f"{named(pass_through)}: kept beside the weights as they are; training does not change them")
    if quantized := [weight.quantized for weight in reader.weights.values() if weight.quantized]:
        log(
            f"{len(quantized)} weights in {quantized[0].scheme.title} are written as bfloat16; their scales are kept in hf/"
        )
    if others := other_weights(reader.path, set(reader.files)):
        log(f"not carried over, being other forms of the weights: {', '.join(others)}")


def as_stored(architecture: Architecture, names: Collection[str], where: Path) -> Architecture:
    """The model without layers for tokens further ahead where `where` has none of their tensors; said so."""
    stored = registry.as_stored(architecture, names)
    if stored != architecture:
        log(
            f"{where} has no tensor of the layers for tokens further ahead (multi-token prediction): "
            "the result has none either"
        )
    return stored


def pass_through_of(files: Path) -> dict[str, TensorInfo]:
    """The tensors kept beside the weights; `files` is where config.json lies."""
    path = files / PASS_THROUGH_FILE
    return {tensor.name: tensor for tensor in read_header(path).tensors} if path.is_file() else {}


def with_kept(table: Table, files: Path) -> tuple[Table, dict[str, TensorInfo]]:
    """The table under the names that the model's files give, and the tensors that are kept beside its weights.

    Those that every checkpoint of the model has are in hf/asides.safetensors, or where the model's own directory is given
    in `files` among its weights.

    Raises:
        UserError: one of them is in neither, or of another shape than config.json asks for.
    """
    pass_through = pass_through_of(files)
    if (files / LAYOUT).is_file():
        table = table.with_prefixes_of(WeightLayout.read(files / LAYOUT).tensors())
    elif table.required_pass_through():
        if not pass_through:
            pass_through = _of_whole(table, files)
        table = table.with_prefixes_of(pass_through)
        pass_through = {name: tensor for name, tensor in pass_through.items() if name in table.pass_through_names()}
    kept = table.required_pass_through()
    if missing := sorted(kept.keys() - pass_through.keys()):
        raise UserError(
            f"{files / PASS_THROUGH_FILE}: {named(missing)} missing, which the model has beside its language model; "
            "restore hf/, or give --hf-files the model's own directory, weights included"
        )
    for name, shape in kept.items():
        if pass_through[name].shape != shape:
            raise UserError(
                f"{pass_through[name].place}: {name} is {list(pass_through[name].shape)}, config.json asks for {list(shape)}"
            )
    return table, pass_through


def _of_whole(table: Table, files: Path) -> dict[str, TensorInfo]:
    """The weights of the model's own directory, which has what was never in the other form."""
    try:
        return HfReader(files, flag="--hf-files").tensors
    except UserError as error:
        raise UserError(
            f"{files} lacks {named(sorted(table.required_pass_through()))}, which the model has beside its language model; "
            f"give --hf-files the model's own directory, weights included ({error})"
        ) from None


def converts(plan: Import, reader: HfReader) -> bool:
    """Whether numbers change their type, or columns their place."""
    shifted = any(entry.zero_centered_gamma for entry in plan.account.entries)
    quantized = any(weight.quantized for weight in reader.weights.values())
    return bool(plan.upcast) or shifted or quantized or reader.splits_columns


def source_checks(checkpoint: Checkpoint, plan: Import, reader: HfReader, shard: Shard | None) -> Checks:
    """What is checked of the source while it is read: its hashes, and by one process what is stored twice."""

    def checks(sources: frozenset[Path]) -> list[Task]:
        ties = tied_checks(plan, reader) if shard is None or shard.index == 1 else []
        return [*content_checks(checkpoint, sources, flag="--source"), *ties]

    return checks


def keep_hf_files(out: Publication, plan: Import, reader: HfReader) -> None:
    """Write `hf/`: every other file of the source, the shards it had, and the tensors that are not in the other form."""
    hf = out.path / "hf"
    hf.mkdir(exist_ok=True)
    for directory in reader.auxiliary_directories:
        copy_passengers(directory, hf)
    if not (hf / "config.json").is_file():
        (hf / "config.json").write_text(json.dumps(reader.config, indent=2) + "\n", encoding="utf-8")
    (hf / LAYOUT).write_text(reader.layout.encode(), encoding="utf-8")
    if kept := _kept(plan, reader):
        aside = default_layout([(tensor.name, tensor.dtype, tensor.shape) for tensor in kept], file=PASS_THROUGH_FILE)
        write_weights(
            hf, aside, lambda t: reader.rows(t.name), lambda name, digest: out.record_hash(f"hf/{name}", digest)
        )


def _kept(plan: Import, reader: HfReader) -> list[TensorInfo]:
    """What is kept as it is: tensors that are no weights, and what says what the codes of those that are stand for."""
    kept = [tensor for name in plan.account.pass_through for tensor in reader.weights[name].stored]
    beside = [
        tensor for weight in reader.weights.values() if weight.quantized for tensor in weight.quantized.companions
    ]
    return [*kept, *(tensor for tensor in beside if tensor not in kept)]
