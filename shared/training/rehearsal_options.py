"""Flags of `--rehearse`, and the process in which it runs. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import replace

from shared.console import log
from shared.errors import UserError
from shared.rehearsal import reexecute
from shared.rehearsal.launch_map import Nodes
from shared.rehearsal.machine import DEFAULT_GPU, GPUS, Gpu, parse_memory
from shared.rehearsal.speed import GPUS_PER_NODE
from shared.training.config import TrainingConfig
from shared.training.options import TrainingOptions


def gpu(options: TrainingOptions) -> Gpu | None:
    """The GPU to rehearse with; None without `--rehearse`. UserError for a flag that would do nothing."""
    if not options.rehearse:
        given = {
            "--gpu": options.gpu,
            "--gpu-memory": options.gpu_memory,
            "--world": options.world,
            "--gpus-per-node": options.gpus_per_node,
            "--all-ranks": options.all_ranks,
        }
        for flag, value in given.items():
            if value:
                raise UserError(f"{flag} belongs to --rehearse; give it, or leave {flag} out")
        return None
    kind = GPUS[options.gpu or DEFAULT_GPU]
    return kind if options.gpu_memory is None else replace(kind, memory=parse_memory(options.gpu_memory))


def world(options: TrainingOptions, needed: int) -> int | None:
    """The number of ranks of a rehearsal; None without `--rehearse`. `needed`: of the layout.

    GPUs of this machine do not count: it is not where the run will be.
    """
    if not options.rehearse:
        return None
    if options.world and options.processes and options.world != options.processes:
        raise UserError(
            f"--world {options.world} and --processes {options.processes} both say how many ranks there are; give one of them"
        )
    return options.world or options.processes or needed


def nodes(options: TrainingOptions, ranks: int) -> Nodes:
    """Where the ranks of a rehearsal would be launched."""
    return Nodes.filled(ranks, options.gpus_per_node or GPUS_PER_NODE)


def enter(config: TrainingConfig, kind: Gpu) -> TrainingConfig:
    """Go on in a process with the stubs. Returns, there, the configuration to rehearse.

    Raises:
        UserError: a rehearsal cannot be started here, or cannot play this configuration.
    """
    if config.backend == "te":
        raise UserError(
            "--rehearse has no stubs for TransformerEngine (--backend te); give --backend local, which keeps more activations"
        )
    if not reexecute.playing():
        reexecute.check_environment(os.environ)
        reexecute.reexecute(kind)
    if unchecked := reexecute.unchecked():
        log(
            f"stubs       {len(unchecked)} functions of this torch were not looked at, and do nothing: {', '.join(unchecked)}"
        )
    return replace(config, backend="local")
