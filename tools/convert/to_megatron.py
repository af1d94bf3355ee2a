"""`convert to-megatron`: a Hugging Face directory into one that Megatron-Core's dist_checkpointing loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shared.checkpoint.execute import Task
from shared.checkpoint.hf import LAYOUT, HfReader, default_layout, write_weights
from shared.checkpoint.passengers import copy_passengers, other_weights
from shared.checkpoint.reader import TRACKER, content_checks, open_checkpoint
from shared.checkpoint.shards import Shard, published
from shared.cli import log
from tools.convert.execute import execute
from tools.convert.transfer import COMMON, alias_checks, beside, layout_import, named, plan_import

RELEASE = "release"  # Megatron-LM's name for a checkpoint that no training run made: it asks for no optimizer
ASIDES = "asides.safetensors"


def run(source: Path, target: Path, overwrite: bool, workers: int | None, shard: Shard | None) -> None:
    """Convert; publishes `target` of kind megatron."""
    with published(target, kind="megatron", inputs={"source": source}, overwrite=overwrite, shard=shard) as out:
        checkpoint = open_checkpoint(source, kinds=("hf",), flag="--source", verify="small")
        reader = HfReader(source)
        plan = plan_import(reader)
        layout = layout_import(plan, reader)
        files = [replace(file, name=f"{RELEASE}/{file.name}") for file in layout.files()]
        if plan.widened:
            names = ", ".join(plan.widened)
            log(f"{names}: layers of different types are held in float32, and written back as they were")
        if asides := plan.account.asides:
            log(f"{named(asides)}: kept beside the weights as they are; training does not change them")
        if packed := [weight.packed for weight in reader.weights.values() if weight.packed]:
            log(
                f"{len(packed)} weights in {packed[0].form.title} are written as bfloat16; their scales are kept in hf/"
            )
        used = set(reader.files)
        if others := other_weights(source, used):
            log(f"not carried over, being other forms of the weights: {', '.join(others)}")

        def checks(sources: frozenset[Path]) -> list[Task]:
            ties = alias_checks(plan, reader) if shard is None or shard.index == 1 else []
            return [*content_checks(checkpoint, sources, flag="--source"), *ties]

        execute(
            "to-megatron",
            plan.architecture,
            out,
            files,
            target,
            workers=workers,
            strips=any(entry.transposed for entry in plan.account.entries),
            converts=bool(plan.widened or packed) or any(entry.less_one for entry in plan.account.entries),
            checks=checks,
        )
        if not out.finishing:
            return
        layout.finish(out.path / RELEASE, COMMON)
        (out.path / TRACKER).write_text(RELEASE, encoding="utf-8")
        hf = out.path / "hf"
        hf.mkdir(exist_ok=True)
        copy_passengers(source, hf)
        (hf / LAYOUT).write_text(reader.layout.encode(), encoding="utf-8")
        if kept := beside(plan, reader):
            aside = default_layout([(tensor.name, tensor.dtype, tensor.shape) for tensor in kept], file=ASIDES)
            write_weights(
                hf, aside, lambda t: reader.rows(t.name), lambda name, digest: out.record_hash(f"hf/{name}", digest)
            )
        out.describe(
            family=plan.architecture.family,
            architecture=plan.architecture.to_dict(),
            dtype=sorted({dtype.name for dtype in plan.dtypes.values()}),
            tensors=len(plan.dtypes),
            parameters=plan.architecture.parameter_count(),
        )
