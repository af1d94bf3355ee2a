"""`convert to-hf`: a Megatron or TransformerEngine directory to a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy.worker_pool import Task
from shared.checkpoint.directory.auxiliary_files import check_auxiliary_files, copy_auxiliary_files, read_config
from shared.checkpoint.directory.model_card import Stage, write_card
from shared.checkpoint.directory.open import Checkpoint, content_checks, open_checkpoint
from shared.checkpoint.directory.sharded_publish import ShardSpec, publish_sharded
from shared.checkpoint.dtypes import BY_FLAG, Dtype
from shared.checkpoint.formats.hugging_face import LAYOUT, WeightLayout, write_index
from shared.checkpoint.formats.megatron_lm_ranks import rank_files
from shared.checkpoint.formats.torch_dist_reader import TorchDistReader
from shared.checkpoint.formats.transformer_engine_reader import TeReader
from shared.cli import log
from shared.console import abbreviated
from shared.errors import UserError
from shared.families import registry
from shared.mapping.transformer_engine import te_form
from shared.precision import Precision
from tools.convert.conversion import run_conversion
from tools.convert.hf_files import (
    PASS_THROUGH_FILE,
    match_pass_through,
    original_scheme,
    pass_through_tensors,
    remove_quantization_config,
)
from tools.convert.hf_source import ignored_fact
from tools.convert.megatron_lm import MegatronLmReader
from tools.convert.megatron_lm_names import HEAD
from tools.convert.plan_export import ExportPlan, constant_checks, export_files, plan_export
from tools.convert.planning import MegatronReader, with_stored_mtp


def run(
    source: Path,
    target: Path,
    dtype: Precision | None,
    hf_files: Path | None,
    family: str | None,
    ignore_config_field: tuple[str, ...],
    overwrite: bool,
    workers: int | None,
    shard: ShardSpec | None,
    quantized: bool = False,
    iteration: int | None = None,
) -> None:
    """Convert; publishes `target` of kind hf."""
    if quantized and dtype:
        raise UserError("--quantized and --dtype exclude each other: the quantisation scheme fixes the dtypes")
    if quantized and family:
        raise UserError("--quantized and --family exclude each other: the quantisation is of the original tensor names")
    inputs = {"source": source} | ({"hf_files": hf_files} if hf_files else {})
    with publish_sharded(target, kind="hf", inputs=inputs, overwrite=overwrite, shard=shard) as out:
        checkpoint = open_checkpoint(
            source, kinds=("megatron", "te"), flag="--source", verify="small", per_rank="megatron", iteration=iteration
        )
        if hf_files:
            check_auxiliary_files(hf_files, "--hf-files")
        files = hf_files or checkpoint.hf_files
        names = sorted({*ignore_config_field, *registry.recorded_ignored(files)})
        reader, plan = open_export(checkpoint, files, dtype, family, quantized=quantized, ignored=ignore_config_field)
        ignored = ignored_fact(names)
        _log_export(plan, reader, dtype)

        def checks(sources: frozenset[Path]) -> list[Task]:
            once = constant_checks(plan, reader) if shard is None or shard.index == 1 else []
            if isinstance(reader, MegatronLmReader) and (shard is None or shard.index == 1):
                once += reader.checks()
            return [*content_checks(checkpoint, sources, flag="--source"), *once]

        run_conversion(
            "to-hf",
            plan.architecture,
            out,
            export_files(plan, reader),
            target,
            workers=workers,
            transposes=plan.transposes,
            casts=plan.casts(reader),
            checks=checks,
            memory_per_worker=max((weight.operation_bytes for weight, _ in plan.components.values()), default=0),
        )
        if not out.writes_auxiliary_files:
            return
        write_index(out.path, plan.layout)
        own = read_config(files / "config.json")
        if family and not _matches_family(own, family):
            _write_config(out.path / "config.json", plan.architecture, own)
        copy_auxiliary_files(files, out.path)
        if not quantized:
            remove_quantization_config(out.path / "config.json")
        if dtype:
            _set_dtype(out.path / "config.json", BY_FLAG[dtype].name)
        if training := Stage.of_run(checkpoint.manifest):
            write_card(out.path, training, name=target.name)
        tensors = plan.layout.tensors()
        out.describe(
            family=plan.architecture.family,
            architecture=plan.architecture.to_dict(),
            dtype=sorted({tensor.dtype for tensor in tensors.values()}),
            tensors=len(tensors),
            parameters=plan.architecture.parameter_count(),
            **ignored,
            **({"iteration": checkpoint.iteration_path.name} if checkpoint.kind == "megatron" else {}),
        )


def _log_export(plan: ExportPlan, reader: MegatronReader, dtype: Precision | None) -> None:
    """Log downcasts, pass-through tensors and what a Hugging Face directory has no place for."""
    if isinstance(reader, TorchDistReader | TeReader) and (states := reader.fp8_states()):
        log(
            f"{abbreviated(states)}: FP8 scales and amax histories, left out: a Hugging Face directory has no place for them; "
            "training in FP8 from it makes them anew"
        )
    tensors = plan.layout.tensors()
    if plan.downcast:
        held = sorted(
            {reader.tensors[entry.key].dtype.name for name in plan.downcast for entry, _ in plan.origin[name]}
        )
        written = sorted({tensors[name].dtype for name in plan.downcast})
        reason = "--dtype" if dtype else "the original dtypes"
        log(f"{len(plan.downcast)} tensors downcast from {', '.join(held)} to {', '.join(written)} ({reason})")
    if plan.pass_through:
        types = sorted({weight.dtype for weight in plan.pass_through.values()})
        log(
            f"{abbreviated(list(plan.pass_through))}: pass-through tensors, as in the original checkpoint"
            f"{f'; they stay {", ".join(types)}, --dtype is of the others' if dtype else ''}"
        )


_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")  # same in every family's config.json


def _matches_family(config: Mapping[str, Any], family: str) -> bool:
    """Whether config.json is the family's, with current transformers field names."""
    wanted = registry.FAMILIES[family]
    named = (config.get("model_type"), config.get("architectures"))
    # compared as JSON: 6 is not 6.0
    same = json.dumps(wanted.without_legacy_names(config), sort_keys=True) == json.dumps(config, sort_keys=True)
    return same and named == (wanted.model_types[0], [wanted.hf_class])


def _write_config(path: Path, architecture: Architecture, source: Mapping[str, Any]) -> None:
    """Write config.json for another family, with the source's token ids and dtype."""
    kept = {name: source[name] for name in _KEPT if name in source}
    config = registry.to_config(architecture, **kept)
    log(
        f"config.json: written as {config['model_type']} ({config['architectures'][0]}), context length "
        f"{architecture.max_position_embeddings}"
    )
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_dtype(path: Path, name: str) -> None:
    """Set dtype in config.json to the weights' dtype; loaders use it."""
    config = read_config(path)

    def with_dtype(part: Mapping[str, Any]) -> dict[str, Any]:
        return {**part, **{field: name for field in ("dtype", "torch_dtype") if field in part}}

    changed = with_dtype(config)
    if "text_config" in config:
        changed["text_config"] = with_dtype(config["text_config"])
    if changed != config:
        log(f"config.json: dtype is {name}")
        path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_export(
    checkpoint: Checkpoint,
    files: Path,
    dtype: Precision | None,
    family: str | None = None,
    *,
    quantized: bool = False,
    ignored: tuple[str, ...] = (),
) -> tuple[MegatronReader, ExportPlan]:
    """The reader of a checkpoint and the plan of its export.

    Args:
        checkpoint: of kind megatron or te.
        files: directory of config.json, and of weights.json if the checkpoint was converted from Hugging Face.
        dtype: dtype of the weights; None for the original dtypes.
        family: output family of config.json and tensor names; None for the model's family.
        quantized: quantise the weights that the original checkpoint stored quantised.
        ignored: unknown fields of config.json that are passed over, besides those recorded in the manifest.
    """
    if not (files / "config.json").is_file():
        raise UserError(f"{files / 'config.json'} is missing; give --hf-files DIR with config.json and tokenizer")
    config = read_config(files / "config.json")
    registry.check_ignored(config, ignored)
    architecture = registry.from_files(files, ignored)
    if quantized and config.get("quantization_config") is None:
        raise UserError(f"--quantized: {files / 'config.json'} has no quantization_config; leave the flag out")
    if quantized and not (files / LAYOUT).is_file():
        raise UserError(f"--quantized: {files / LAYOUT}, the list of quantised weights, is missing; leave the flag out")
    scheme = original_scheme(files)
    if quantized and scheme is None:
        raise UserError("--quantized: no weight of the original checkpoint is quantised; leave the flag out")
    layout = WeightLayout.read(files / LAYOUT) if (files / LAYOUT).is_file() else None
    pass_through = pass_through_tensors(files)
    own, wanted = architecture, BY_FLAG[dtype] if dtype else None
    renamed = bool(family and family != architecture.family)
    if family and renamed:
        if pass_through and architecture.mtp:
            raise UserError(
                f"--family {family} has no MTP layers, {files / PASS_THROUGH_FILE} holds some; leave it out"
            )
        architecture = registry.as_family(architecture, family)
        wanted = wanted or _single_dtype(layout)
        if pass_through:
            log(f"{len(pass_through)} pass-through tensors left out, {family} has none: {min(pass_through)}, ...")
        layout, pass_through, scheme = None, {}, None  # the names differ
    reader: MegatronReader
    if checkpoint.kind == "te":
        table, reader = te_form(registry.table_of(architecture), architecture).table, TeReader(checkpoint.path)
    elif rank_files(checkpoint.iteration_path):
        architecture = replace(architecture, mtp=None)  # MTP layers in rank files are refused
        table = registry.table_of(architecture)
        reader = MegatronLmReader(checkpoint.iteration_path, architecture, table)
    else:
        reader = TorchDistReader(checkpoint.iteration_path)
        stored = registry.drop_missing_mtp if pass_through else partial(with_stored_mtp, where=checkpoint.path)
        architecture = stored(architecture, reader.tensors)
        table = registry.table_of(architecture)
    if not renamed:
        table, pass_through = match_pass_through(table, files)
    plan = plan_export(reader, architecture, table, layout, pass_through, wanted, scheme=scheme, quantized=quantized)
    if own.head.normalized and not architecture.head.normalized:
        (head,) = (name for name, ((entry, _), *_) in plan.origin.items() if entry.key == HEAD)
        log(
            f"{head}: rows divided by their L2 norms (the normalised head of {own.family}, which {family} lacks) and rounded "
            f"to {plan.layout.tensors()[head].dtype}; to-megatron of the result gives the divided rows"
        )
        plan = replace(plan, unit_rows=frozenset([head]))
    return reader, plan


def _single_dtype(layout: WeightLayout | None) -> Dtype | None:
    """The common dtype of the source's weights; None if they differ."""
    found = {tensor.dtype for tensor in layout.tensors().values()} if layout else set()
    return next((dtype for dtype in BY_FLAG.values() if found == {dtype.safetensors}), None)
