"""What a rehearsal prints: the memory of each rank, where it goes, and what was matched. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shared.console import quantity
from shared.rehearsal.machine import RESERVE, Gpu
from shared.training.config import TrainingConfig

if TYPE_CHECKING:
    from shared.rehearsal.collectives import Matched, Operation
    from shared.rehearsal.memory import Phase
    from shared.rehearsal.work import Counted

TRAINING = "forward and backward"
UPDATES = 2  # that are played: the optimizer's state is made by the first
_SHOWN_MODULES = 3
_SHOWN_RANKS = 64


@dataclass(frozen=True, kw_only=True)
class Played:
    """A rank, as it was played. Bytes."""

    rank: int
    phases: Sequence[Phase]
    kept: Mapping[str, int]  # by module: what the forward pass of a micro batch leaves for its backward pass
    operations: Sequence[Operation]
    shapes: Mapping[str, tuple[int, ...]]  # of the tensors that it reads of the checkpoint
    out_of_memory: str  # torch's words; empty: it fits
    where: tuple[str, str]  # phase and module of that
    held: Mapping[str, int] = field(
        default_factory=dict
    )  # of weights, gradients and the optimizer's state, after an update
    work: Mapping[str, Counted] = field(default_factory=dict)  # by phase; empty: not counted
    groups: Sequence[tuple[str, tuple[int, ...]]] = ()  # all process groups of the world: torch's description, ranks

    @property
    def highest(self) -> Phase:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def peak(self) -> int:
        """Allocated, at most."""
        return self.highest.peak

    @property
    def reserved(self) -> int:
        """Taken from the GPU, at most."""
        return max(phase.reserved for phase in self.phases)

    @property
    def states(self) -> int:
        """Weights, gradients and the optimizer's state: allocated between updates."""
        return self._training.before

    @property
    def activations(self) -> int:
        """More than that in forward and backward passes, at most: also gradients of activations, logits, buffers."""
        return self._training.peak - self._training.before

    @property
    def _training(self) -> Phase:
        return next(phase for phase in self.phases if phase.name == f"{TRAINING} of update {UPDATES}")


def lines(played: Mapping[int, Played], config: TrainingConfig, gpu: Gpu, matched: Matched) -> list[str]:
    """The report. `played`: with the memory that they need, fit or not."""
    parallel, world = config.parallel, config.parallel.processes
    shown = list(played.values())[:_SHOWN_RANKS]
    rows: list[tuple[str, ...]] = [("rank", "stage", "states", "activations", "peak", "reserved", "margin")]
    rows += [
        (
            str(each.rank),
            str(stage_of(each.rank, config)),
            *(quantity(size, "bytes") for size in (each.states, each.activations, each.peak, each.reserved)),
            _signed(gpu.usable - each.reserved),
        )
        for each in shown
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if len(shown) < len(played):
        table.append(f"and {len(played) - len(shown)} ranks more")
    worst = max(played.values(), key=lambda each: each.reserved)
    each = (
        "every rank"
        if len(played) == world
        else "the first of each pipeline stage"
        if parallel.pipeline > 1
        else "the first"
    )
    kept = sorted(worst.kept.items(), key=lambda item: -item[1])[:_SHOWN_MODULES]
    modules = ", ".join(f"{quantity(size, 'bytes')} {name}" for name, size in kept if size > 0)
    return [
        f"rehearsal   {len(played)} of {world} rank{'s' * (world > 1)}, {each}, on {gpu.title} "
        f"({quantity(gpu.memory, 'bytes')}, {quantity(RESERVE, 'bytes')} of it kept free for CUDA and NCCL)",
        *table,
        f"peak        of rank {worst.rank} in {worst.highest.name}",
        *([f"kept        by forward passes of rank {worst.rank}, each micro batch: {modules}"] if modules else []),
        f"collectives {matched.operations:,} operations in {matched.groups} groups and pairs "
        + ("do not match" if matched.mismatch else "match on the ranks played" if matched.operations else "(none)"),
        f"checkpoint  {len({key for each in played.values() for key in each.shapes})} tensors match by name and shape; no weight "
        "was read",
        "validity    not yet compared with a GPU; speed and numbers are not rehearsed",
    ]


def stage_of(rank: int, config: TrainingConfig) -> int:
    """The pipeline stage of a rank."""
    return rank // (config.parallel.processes // config.parallel.pipeline)


def _signed(size: int) -> str:
    return quantity(size, "bytes") if size >= 0 else f"-{quantity(-size, 'bytes')}"
