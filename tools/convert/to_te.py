"""`convert to-te`: a Hugging Face directory into one whose tensors are those of TransformerEngine's modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.sharded_publish import Shard, published
from shared.checkpoint.formats.hugging_face import write_index
from shared.checkpoint.formats.transformer_engine import LAYERS
from shared.cli import log
from shared.families import registry
from shared.mapping.transformer_engine import te_form
from tools.convert.beside import announce, converts, keep_hf_files, source_checks
from tools.convert.execute import execute
from tools.convert.source import inputs_of, open_source
from tools.convert.transfer import layout_te, plan_import


def run(
    source: Path,
    target: Path,
    hf_files: Path | None,
    overwrite: bool,
    workers: int | None,
    shard: Shard | None,
) -> None:
    """Convert; publishes `target` of kind te."""
    inputs = inputs_of(source, hf_files)
    with published(target, kind="te", inputs=inputs, overwrite=overwrite, shard=shard) as out:
        checkpoint, reader = open_source(source, hf_files)
        architecture = registry.from_config(registry.completed(reader.config, source))
        form = te_form(registry.table_of(architecture), architecture)
        plan = plan_import(reader, architecture, form.table)
        layout, files = layout_te(plan, reader, form.extra_states)
        announce(plan, reader)
        for line in summary(form.modules["layers"]):
            log(line)
        execute(
            "to-te",
            architecture,
            out,
            files,
            target,
            workers=workers,
            strips=any(entry.transposed for entry in plan.account.entries),
            converts=converts(plan, reader),
            checks=source_checks(checkpoint, plan, reader, shard),
        )
        if not out.finishing:
            return
        write_index(out.path, layout)
        (out.path / LAYERS).write_text(json.dumps(form.modules, indent=1) + "\n", encoding="utf-8")
        keep_hf_files(out, plan, reader)
        out.describe(
            family=architecture.family,
            architecture=architecture.to_dict(),
            dtype=sorted({dtype.name for dtype in plan.dtypes.values()}),
            tensors=len(plan.dtypes),
            parameters=architecture.parameter_count(),
        )


def summary(layers: list[dict[str, Any]]) -> list[str]:
    """How many layers are TransformerEngine's own, and why the others are not."""
    whole = sum("class" in layer for layer in layers)
    lines = [f"{whole} of {len(layers)} layers are TransformerLayer"]
    for because in dict.fromkeys(tuple(layer["because"]) for layer in layers if "class" not in layer):
        count = sum(tuple(layer.get("because", ())) == because for layer in layers)
        lines.append(f"{count} are smaller modules, for your own forward to join: {'; '.join(because)}")
    return lines
