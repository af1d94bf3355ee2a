"""`convert to-megatron`: a Hugging Face directory to torch_dist, which Megatron-Core's dist_checkpointing loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shared.checkpoint.directory.recognition import TRACKER
from shared.checkpoint.directory.sharded_publish import ShardSpec, publish_sharded
from shared.families import registry
from tools.convert.conversion import run_conversion
from tools.convert.hf_files import write_hf_files
from tools.convert.hf_source import inputs_of, open_hf_source, source_architecture
from tools.convert.name_prefix import check_prefix, stripped_fact
from tools.convert.plan_import import COMMON, describe_import, import_checks, log_import, plan_import, torch_dist_layout
from tools.convert.planning import with_stored_mtp

RELEASE = "release"  # Megatron-LM's name of an iteration without optimizer state


def run(
    source: Path,
    target: Path,
    hf_files: Path | None,
    ignore_config_field: tuple[str, ...],
    strip_prefix: str | None,
    overwrite: bool,
    workers: int | None,
    shard: ShardSpec | None,
) -> None:
    """Convert; publishes `target` of kind megatron."""
    inputs = inputs_of(source, hf_files)
    with publish_sharded(target, kind="megatron", inputs=inputs, overwrite=overwrite, shard=shard) as out:
        checkpoint, reader = open_hf_source(source, hf_files, strip_prefix=strip_prefix)
        declared, ignored = source_architecture(reader, source, ignore_config_field)
        architecture = with_stored_mtp(declared, reader.weights, source)
        table = registry.table_of(architecture)
        check_prefix(reader, table, strip_prefix)
        plan = plan_import(reader, architecture, table)
        layout = torch_dist_layout(plan, reader)
        log_import(plan, reader)
        run_conversion(
            "to-megatron",
            architecture,
            out,
            [replace(file, name=f"{RELEASE}/{file.name}") for file in layout.files()],
            target,
            workers=workers,
            transposes=plan.transposes,
            casts=plan.casts(reader),
            checks=import_checks(checkpoint, plan, reader, shard),
        )
        if not out.writes_auxiliary_files:
            return
        layout.finish(out.path / RELEASE, COMMON)
        (out.path / TRACKER).write_text(RELEASE, encoding="utf-8")
        write_hf_files(out, plan, reader)
        describe_import(out, plan, checkpoint, **ignored, **stripped_fact(strip_prefix))
