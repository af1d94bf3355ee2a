"""`convert to-te`: a Hugging Face directory to the parameters of TransformerEngine's modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.sharded_publish import ShardSpec, publish_sharded
from shared.checkpoint.formats.hugging_face import write_index
from shared.checkpoint.formats.transformer_engine_reader import LAYERS
from shared.cli import log
from shared.families import registry
from shared.mapping.transformer_engine import te_form
from tools.convert.conversion import run_conversion
from tools.convert.hf_files import write_hf_files
from tools.convert.hf_source import inputs_of, open_hf_source, source_architecture
from tools.convert.name_prefix import check_prefix, stripped_fact
from tools.convert.plan_import import describe_import, import_checks, log_import, plan_import
from tools.convert.plan_te import te_layout


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
    """Convert; publishes `target` of kind te."""
    inputs = inputs_of(source, hf_files)
    with publish_sharded(target, kind="te", inputs=inputs, overwrite=overwrite, shard=shard) as out:
        checkpoint, reader = open_hf_source(source, hf_files, strip_prefix=strip_prefix)
        architecture, ignored = source_architecture(reader, source, ignore_config_field)
        check_prefix(reader, registry.table_of(architecture), strip_prefix)
        form = te_form(registry.table_of(architecture), architecture)
        plan = plan_import(reader, architecture, form.table)
        layout, files = te_layout(plan, reader, form.extra_states)
        log_import(plan, reader)
        for line in layer_lines(form.modules["layers"]):
            log(line)
        run_conversion(
            "to-te",
            architecture,
            out,
            files,
            target,
            workers=workers,
            transposes=plan.transposes,
            casts=plan.casts(reader),
            checks=import_checks(checkpoint, plan, reader, shard),
        )
        if not out.writes_auxiliary_files:
            return
        write_index(out.path, layout)
        (out.path / LAYERS).write_text(json.dumps(form.modules, indent=1) + "\n", encoding="utf-8")
        write_hf_files(out, plan, reader)
        describe_import(out, plan, checkpoint, **ignored, **stripped_fact(strip_prefix))


def layer_lines(layers: list[dict[str, Any]]) -> list[str]:
    """Number of layers built as TransformerLayer, and the reasons for the others."""
    whole = sum("class" in layer for layer in layers)
    lines = [f"{whole} of {len(layers)} layers are TransformerLayer"]
    for because in dict.fromkeys(tuple(layer["because"]) for layer in layers if "class" not in layer):
        count = sum(tuple(layer.get("because", ())) == because for layer in layers)
        lines.append(f"{count} are split into smaller modules, joined by your own forward: {'; '.join(because)}")
    return lines
