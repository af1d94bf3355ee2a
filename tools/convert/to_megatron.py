"""`convert to-megatron`: a Hugging Face directory into one that Megatron-Core's dist_checkpointing loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shared.checkpoint.directory.open import TRACKER
from shared.checkpoint.directory.sharded_publish import Shard, published
from shared.families import registry
from tools.convert.beside import announce, as_stored, converts, keep_hf_files, source_checks
from tools.convert.execute import execute
from tools.convert.source import inputs_of, open_source
from tools.convert.transfer import COMMON, layout_import, plan_import

RELEASE = "release"  # Megatron-LM's name for a checkpoint that no training run made: it asks for no optimizer


def run(
    source: Path,
    target: Path,
    hf_files: Path | None,
    overwrite: bool,
    workers: int | None,
    shard: Shard | None,
) -> None:
    """Convert; publishes `target` of kind megatron."""
    inputs = inputs_of(source, hf_files)
    with published(target, kind="megatron", inputs=inputs, overwrite=overwrite, shard=shard) as out:
        checkpoint, reader = open_source(source, hf_files)
        architecture = as_stored(
            registry.from_config(registry.completed(reader.config, source)), reader.weights, source
        )
        plan = plan_import(reader, architecture, registry.table_of(architecture))
        layout = layout_import(plan, reader)
        announce(plan, reader)
        execute(
            "to-megatron",
            architecture,
            out,
            [replace(file, name=f"{RELEASE}/{file.name}") for file in layout.files()],
            target,
            workers=workers,
            strips=any(entry.transposed for entry in plan.account.entries),
            converts=converts(plan, reader),
            checks=source_checks(checkpoint, plan, reader, shard),
        )
        if not out.finishing:
            return
        layout.finish(out.path / RELEASE, COMMON)
        (out.path / TRACKER).write_text(RELEASE, encoding="utf-8")
        keep_hf_files(out, plan, reader)
        out.describe(
            family=architecture.family,
            architecture=architecture.to_dict(),
            dtype=sorted({dtype.name for dtype in plan.dtypes.values()}),
            tensors=len(plan.dtypes),
            parameters=architecture.parameter_count(),
        )
