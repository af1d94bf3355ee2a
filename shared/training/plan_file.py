"""The file of `pretrain plan --json`, and a training command that takes its layout. Imports no torch.

A plan is a file and not found anew by each run: a run that is resumed keeps its layout, and GPUs do not wait while it is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.architecture import dictionary
from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.training.options import TrainingOptions

KIND, VERSION = "baton layout plan", 1

# Options of `pretrain train` that a plan says, by their flags, and how they are read.
_INTEGERS = {
    "--tensor-parallel": "tensor_parallel",
    "--pipeline-parallel": "pipeline_parallel",
    "--virtual-pipeline": "virtual_pipeline",
    "--context-parallel": "context_parallel",
    "--expert-parallel": "expert_parallel",
    "--expert-tensor-parallel": "expert_tensor_parallel",
    "--micro-batch-size": "micro_batch_size",
}
_LISTS = {"--pipeline-layers": "pipeline_layers", "--recompute": "recompute"}


def identity(architecture: Architecture) -> str:
    """Differs between models of different architectures."""
    return hashlib.sha256(json.dumps(dictionary.write(architecture), sort_keys=True).encode()).hexdigest()[:16]


def taken(options: TrainingOptions, plan: Path, *, architecture: Architecture, sequence_length: int) -> TrainingOptions:
    """The options with the layout of the plan's first row.

    Raises:
        UserError: the plan is of another run, or is none; an option is said by both.
    """
    found = _read(plan)
    given = {
        "model": (identity(architecture), "the model of --source", None),
        "sequence_length": (sequence_length, f"--sequence-length {sequence_length}", "--sequence-length"),
        "global_batch_size": (
            options.global_batch_size,
            f"--global-batch-size {options.global_batch_size}",
            "--global-batch-size",
        ),
        "precision": (options.precision, f"--precision {options.precision}", "--precision"),
        "lora_rank": (options.lora_rank, f"--lora-rank {options.lora_rank}", "--lora-rank"),
    }
    for name, (value, said, flag) in given.items():
        if found[name] != value:
            other = "another model" if flag is None else f"{flag} {found[name]}" if found[name] else f"no {flag}"
            raise UserError(f"--plan {plan} was made for {other}, and not for {said}; make one for this run")
    flags: Mapping[str, str] = found["layouts"][0]["flags"]
    changes = _changes(flags)
    defaults = type(options)
    for name in (*_INTEGERS.values(), *_LISTS.values(), "sequence_parallel"):
        if getattr(options, name) != getattr(defaults, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"--plan {plan} says the layout, and {flag} says it, too; leave one of them out")
    for name in ("world", "processes"):
        if (count := getattr(options, name)) and count != found["gpus"]:
            raise UserError(
                f"--plan {plan} was made for {found['gpus']} GPUs, and --{name} is {count}; make one for this run"
            )
    return replace(options, **changes)


def check_world(plan: Path, processes: int) -> None:
    """UserError if the run has other processes than the plan was made for."""
    if (gpus := _read(plan)["gpus"]) != processes:
        raise UserError(
            f"--plan {plan} was made for {gpus} GPUs, and this run has {processes} processes; make one for it"
        )


def _changes(flags: Mapping[str, str]) -> dict[str, Any]:
    changes: dict[str, Any] = {name: int(flags[flag]) for flag, name in _INTEGERS.items() if flag in flags}
    if "--pipeline-layers" in flags:
        changes["pipeline_layers"] = tuple(map(int, flags["--pipeline-layers"].split(",")))
    if "--recompute" in flags:
        changes["recompute"] = tuple(flags["--recompute"].split(","))
    if "--sequence-parallel" in flags:
        changes["sequence_parallel"] = True
    return changes


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"--plan {path} is no JSON file: {error}; make one by `pretrain plan --json FILE`") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(f"--plan {path} is no plan; make one by `pretrain plan --json FILE`")
    if found.get("version") != VERSION:
        raise UserError(f"--plan {path} has version {found.get('version')}, this tool reads {VERSION}; make it again")
    if not found["layouts"]:
        raise UserError(f"--plan {path} has no layout that fits; make one for more GPUs")
    return found
