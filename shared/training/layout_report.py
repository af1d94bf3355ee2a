"""What `pretrain plan` prints and writes: the table, the winning command, the assumptions."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.console import quantity
from shared.rehearsal import launch_map
from shared.rehearsal.machine import RESERVE
from shared.training.choose_layout import Planner, Rehearsed, Search
from shared.training.plan_file import KIND, VERSION, identity

NOT_COMPARED = "memory is rehearsed and times are a roofline: neither was compared with a GPU"
_SHOWN_FAILURES = 2


def fitting(planner: Planner, found: Search) -> list[Rehearsed]:
    """Layouts that fit, the fastest first."""
    return [each for each in found.rehearsed if each.fits(planner.gpu)]


def rows(planner: Planner, found: Search, top: int) -> list[Rehearsed]:
    """That are shown: those that fit; if none does, those that need least."""
    fit = fitting(planner, found)
    return (
        fit[:top]
        if fit
        else sorted((each for each in found.rehearsed if each.update), key=lambda each: each.reserved)[:top]
    )


def command(row: Rehearsed, *, source: str, gpus: int, base_flags: Sequence[str]) -> str:
    """A command line of `pretrain train` that plays this layout; without --rehearse, it trains in it."""
    flags = [word for flag, value in row.candidate.flags.items() for word in ([flag, value] if value else [flag])]
    words = ["pretrain", "train", "--source", source, "--data", "DATA", "--target", "RUN", *base_flags, *flags]
    return " ".join(shlex.quote(word) for word in [*words, "--rehearse", "--world", str(gpus)])


def lines(planner: Planner, found: Search, top: int) -> list[str]:
    """The report, without the command."""
    gpu, config = planner.gpu, planner.base
    shown = rows(planner, found, top)
    table: list[tuple[str, ...]] = [
        ("layout", "micro batch", "recompute", "states", "peak", "reserved", "margin", "s/update", "MFU", "of it")
    ]
    table += [_row(planner, each) for each in shown]
    table = table if shown else []
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))] if shown else []
    failed = [each for each in found.rehearsed if each.failed]
    return [
        f"plan        {planner.gpus} x {gpu.title} ({quantity(gpu.memory, 'bytes')}, {quantity(RESERVE, 'bytes')} of it "
        f"kept free), {config.global_batch_size} sequences of {config.sequence_length} an update",
        f"searched    {found.legal:,} legal layouts; {found.too_large:,} cannot hold their states; "
        f"{len(found.rehearsed)} rehearsed ({found.ranks} ranks, {found.seconds:.0f} s), {len(fitting(planner, found))} fit",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table),
        *(f"failed      {each.candidate.short()}: {each.failed}" for each in failed[:_SHOWN_FAILURES]),
        *_of_first(planner, shown),
        *(f"assumed     {line}" for line in planner.speed.lines(per_node(planner)) if shown),
        f"validity    {NOT_COMPARED}",
    ]


def per_node(planner: Planner) -> int:
    """GPUs of the first node."""
    return planner.nodes.of.count(0)


def _row(planner: Planner, each: Rehearsed) -> tuple[str, ...]:
    update = each.update
    assert update is not None
    parts = {
        "compute": update.compute,
        **update.links,
        "bubble": update.bubble,
        "DP": update.data,
        "optimizer": update.optimizer,
    }
    margin = planner.gpu.usable - each.reserved
    layout = each.candidate.short()
    if each.candidate.parallel.pipeline_layers:
        layout += f" layers {_runs(each.candidate.parallel.pipeline_layers)}"
    return (
        layout,
        str(each.candidate.config.micro_batch_size),
        each.candidate.recompute,
        quantity(max(stage.total for stage in each.held), "bytes"),
        quantity(each.peak, "bytes"),
        quantity(each.reserved, "bytes"),
        f"{'-' * (margin < 0)}{quantity(abs(margin), 'bytes')}",
        f"{update.seconds:.3g}",
        f"{each.mfu(planner.architecture, planner.speed):.0%}",
        ", ".join(
            f"{name} {value / update.seconds:.0%}" for name, value in parts.items() if value >= 0.005 * update.seconds
        ),
    )


def _runs(layers: Sequence[int]) -> str:
    """15 stages of 4 layers and one of 1: 15x4+1."""
    words: list[str] = []
    index = 0
    while index < len(layers):
        end = index
        while end < len(layers) and layers[end] == layers[index]:
            end += 1
        words.append(f"{end - index}x{layers[index]}" if end - index > 1 else str(layers[index]))
        index = end
    return "+".join(words)


def _of_first(planner: Planner, shown: Sequence[Rehearsed]) -> list[str]:
    """The launch map of the first row."""
    if not shown or not shown[0].played:
        return []
    groups = shown[0].groups
    found = launch_map.lines(groups, planner.nodes, experts=planner.architecture.moe is not None)
    if launch_map.crossing(groups, planner.nodes, "TP"):
        found.append("            TP groups cross nodes: their time is that of the network")
    return found


def as_json(
    planner: Planner, found: Search, top: int, *, gpu_name: str, precision: str, source: Path
) -> dict[str, Any]:
    """The plan, for tools and for `pretrain train --plan`."""
    config = planner.base
    return {
        "kind": KIND,
        "version": VERSION,
        "source": str(source),
        "model": identity(planner.architecture),
        "gpus": planner.gpus,
        "gpu": gpu_name,
        "gpu_memory": planner.gpu.memory,
        "gpus_per_node": per_node(planner),
        "sequence_length": config.sequence_length,
        "global_batch_size": config.global_batch_size,
        "precision": precision,
        "lora_rank": config.lora.rank if config.lora else None,
        "validity": NOT_COMPARED,
        "assumptions": planner.speed.lines(per_node(planner)),
        "searched": {
            "legal": found.legal,
            "states_too_large": found.too_large,
            "rehearsed": len(found.rehearsed),
            "fit": len(fitting(planner, found)),
        },
        "layouts": [_layout(planner, each) for each in fitting(planner, found)[:top]],
    }


def _layout(planner: Planner, each: Rehearsed) -> dict[str, Any]:
    update = each.update
    assert update is not None
    return {
        "flags": each.candidate.flags,
        "bytes": {"states": max(stage.total for stage in each.held), "peak": each.peak, "reserved": each.reserved},
        "stages": {
            str(stage): {"states": played.states, "activations": played.activations, "reserved": played.reserved}
            for stage, played in each.played.items()
        },
        "seconds": {
            "update": update.seconds,
            "compute": update.compute,
            **{f"links {title}": seconds for title, seconds in update.links.items()},
            "bubble": update.bubble,
            "data parallelism": update.data,
            "optimizer": update.optimizer,
        },
        "mfu": each.mfu(planner.architecture, planner.speed),
    }
