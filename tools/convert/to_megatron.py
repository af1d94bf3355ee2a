"""`convert to-megatron`: a Hugging Face directory into one that Megatron-Core's dist_checkpointing loads."""

from __future__ import annotations

import time
from pathlib import Path

from shared.checkpoint.hf import LAYOUT, HfReader, default_layout, write_weights
from shared.checkpoint.passengers import copy_passengers, other_weights
from shared.checkpoint.publish import publish
from shared.checkpoint.reader import TRACKER, open_checkpoint
from shared.checkpoint.torch_dist_writer import TorchDistWriter
from shared.cli import log, progress
from tools.convert.report import plan_lines, summary
from tools.convert.transfer import plan_import, write_import

RELEASE = "release"  # Megatron-LM's name for a checkpoint that no training run made: it asks for no optimizer
ASIDES = "asides.safetensors"


def run(source: Path, target: Path, overwrite: bool) -> None:
    """Convert; publishes `target` of kind megatron."""
    with publish(target, kind="megatron", inputs={"source": source}, overwrite=overwrite) as out:
        open_checkpoint(source, kinds=("hf",), flag="--source")
        reader = HfReader(source)
        plan = plan_import(reader)
        log(plan_lines("to-megatron", plan.architecture, len(reader.tensors), plan.bytes))
        if plan.widened:
            names = ", ".join(plan.widened)
            log(f"{names}: layers of different types are held in float32, and written back as they were")
        used = set(reader.files)
        if others := other_weights(source, used):
            log(f"not carried over, being other forms of the weights: {', '.join(others)}")
        started = time.monotonic()

        def record_release(name: str, digest: str) -> None:
            out.record_hash(f"{RELEASE}/{name}", digest)

        (out.path / RELEASE).mkdir()
        with progress(plan.bytes, "bytes", "converting") as advance:
            write_import(plan, reader, TorchDistWriter(out.path / RELEASE, record_release), advance)
        (out.path / TRACKER).write_text(RELEASE, encoding="utf-8")

        files = out.path / "hf"
        files.mkdir()
        copy_passengers(source, files)
        (files / LAYOUT).write_text(reader.layout.encode(), encoding="utf-8")
        if plan.account.asides:
            kept = [reader.tensors[name] for name in plan.account.asides]
            layout = default_layout([(tensor.name, tensor.dtype, tensor.shape) for tensor in kept], file=ASIDES)
            write_weights(
                files, layout, lambda t: reader.rows(t.name), lambda name, digest: out.record_hash(f"hf/{name}", digest)
            )
        out.describe(
            family=plan.architecture.family,
            architecture=plan.architecture.to_dict(),
            dtype=sorted({dtype.name for dtype in plan.dtypes.values()}),
            tensors=len(plan.dtypes),
            parameters=plan.architecture.parameter_count(),
        )
        log(summary(target, plan.bytes, time.monotonic() - started))
