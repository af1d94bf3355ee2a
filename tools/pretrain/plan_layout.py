"""`pretrain plan`: the layout of a training run on GPUs that are not at hand."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from shared.architecture.architecture import Architecture
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.directory.open import open_checkpoint
from shared.console import log
from shared.errors import UserError
from shared.families import registry
from shared.model.support import check_supported
from shared.precision import RunPrecision
from shared.rehearsal import reexecute
from shared.rehearsal.launch_map import Nodes
from shared.rehearsal.machine import GPUS, GpuName, parse_memory
from shared.rehearsal.speed import SPEEDS
from shared.runtime.silence_warnings import silence
from shared.training import stage
from shared.training.options import TrainingOptions
from shared.training.plan import architecture_of

_SEQUENCE_LENGTH = 4096  # tokens, default; limited by the model's context length, as in `pretrain train`
_STEPS = 1000  # any number: a layout does not depend on it


def run(
    *,
    source: Path,
    gpus: int,
    global_batch_size: int,
    gpu: GpuName,
    gpu_memory: str | None,
    gpus_per_node: int,
    sequence_length: int | None,
    lora_rank: int | None,
    precision: RunPrecision,
    top: int,
    json_file: Path | None,
) -> None:
    """Plan and print. Arguments: of the command.

    Raises:
        UserError: no layout fits; the model cannot be trained; the source says no model.
    """
    architecture = _architecture(source)
    check_supported(architecture)
    length = sequence_length or min(architecture.max_position_embeddings, _SEQUENCE_LENGTH)
    options = TrainingOptions(
        source=source,
        data=(),
        target=Path(os.devnull),
        global_batch_size=global_batch_size,
        micro_batch_size=1,
        precision=precision,
        lora_rank=lora_rank,
        processes=1,
    )
    base = stage.plan(options, steps=_STEPS, sequence_length=length)
    base.check_model(architecture)
    kind = GPUS[gpu] if gpu_memory is None else replace(GPUS[gpu], memory=parse_memory(gpu_memory))
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: the folder {json_file.absolute().parent} is not there; make it first")
    if not reexecute.playing():
        reexecute.check_environment(os.environ, command="pretrain plan", flag="--gpus")
        reexecute.reexecute(kind)
    silence()
    from shared.rehearsal import fake_world

    fake_world.before_forking()
    from shared.training import layout_report
    from shared.training.choose_layout import Planner

    planner = Planner(
        architecture, base, gpus=gpus, gpu=kind, speed=SPEEDS[gpu], nodes=Nodes.filled(gpus, gpus_per_node)
    )
    found = planner.search(top, log)
    if not found.legal:
        raise UserError(
            f"--gpus {gpus}: no layout divides the model and --global-batch-size {global_batch_size} into sequences of "
            f"{length} tokens; give a global batch that is a multiple of more data-parallel ranks, or other numbers of GPUs"
        )
    print("\n".join(layout_report.lines(planner, found, top)), flush=True)
    fit = layout_report.fitting(planner, found)
    if not fit:
        raise UserError(
            f"--gpus {gpus}: no layout was found that fits {kind.title}; give more GPUs, a GPU with more memory, a shorter "
            "--sequence-length" + ("" if lora_rank else ", or --lora-rank")
        )
    flags = ["--sequence-length", str(length), "--global-batch-size", str(global_batch_size)]
    flags += ["--precision", precision] * (precision != "bf16")
    flags += ["--lora-rank", str(lora_rank)] * (lora_rank is not None)
    flags += ["--gpu", gpu] + (["--gpu-memory", gpu_memory] if gpu_memory else [])
    flags += ["--gpus-per-node", str(gpus_per_node)]
    directory = str(source) if source.is_dir() and (source / "hf").is_dir() else "SOURCE"
    print(layout_report.command(fit[0], source=directory, gpus=gpus, base_flags=flags))
    if json_file is not None:
        written = layout_report.as_json(planner, found, top, gpu_name=gpu, precision=precision, source=source)
        json_file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def _architecture(source: Path) -> Architecture:
    """Of a Megatron or Hugging Face directory, or of a config.json; weights need not be there."""
    if source.is_dir() and (source / "hf").is_dir():
        return architecture_of(open_checkpoint(source, kinds=("megatron",), flag="--source", verify="sizes"))
    path = source / "config.json" if source.is_dir() else source
    if not path.is_file():
        raise UserError(f"--source {source} has no config.json that says what the model is; name one")
    if path.name == "config.json":
        return registry.from_files(path.parent)
    return registry.from_config(registry.with_auxiliary_fields(read_config(path), path.parent))
