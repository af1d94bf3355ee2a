"""Chooses the layout of a run: legal layouts, what they hold by arithmetic, rehearsals of the most promising, a ranking.

`fake_world.before_forking` comes before the import of this module, in a process whose CUDA runtime is stubs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from shared.architecture.architecture import Architecture
from shared.checkpoint.directory.open import Checkpoint
from shared.errors import UserError
from shared.parallel import ParallelConfig
from shared.rehearsal.forks import in_forks
from shared.rehearsal.launch_map import Group, Nodes
from shared.rehearsal.machine import Gpu
from shared.rehearsal.speed import Speed
from shared.rehearsal.work import Work
from shared.report.metrics import flops_per_token
from shared.training import loop, rehearse
from shared.training.blend import Blend
from shared.training.config import TrainingConfig
from shared.training.data import Batch
from shared.training.layout_candidates import Candidate, Sizes, candidates, guess, guessed_bytes, least_states
from shared.training.plan import Inputs
from shared.training.rehearsal_report import Played
from shared.training.roofline import Update, stage_time, update_time
from shared.training.states import States, of_stages

_TRIED = 8  # rehearsed candidates for each row that is asked for, at most
_WORSE = 1.3  # a layout whose guess is so many times that of the last row is not in sight
_EACH_STEP = 4  # candidates that are rehearsed together


class _NoWeights(Checkpoint):
    """A model that is only described."""

    @property
    def iteration_path(self) -> Path:
        return self.path


class Zeros:
    """A dataset of so many tokens a row, all alike: what is computed does not depend on them."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return 1

    def batch(self, positions: Any) -> Batch:
        """Rows of zeros."""
        rows = torch.zeros((len(positions), self.sequence_length), dtype=torch.int64)
        return Batch(tokens=rows, labels=rows.clone())


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """A candidate that was rehearsed. Bytes."""

    candidate: Candidate
    held: tuple[States, ...]  # by arithmetic, of each stage
    played: Mapping[int, Played]  # by stage: the first of each kind of stage
    update: Update | None  # None: not all of it could be played, or nothing was counted
    failed: str = ""  # why
    seconds: float = 0.0  # that the rehearsal took

    @property
    def reserved(self) -> int:
        """Of the fullest stage."""
        return max((each.reserved for each in self.played.values()), default=0)

    @property
    def peak(self) -> int:
        """Of the fullest stage."""
        return max((each.peak for each in self.played.values()), default=0)

    @property
    def groups(self) -> Sequence[Group]:
        """All process groups of the world."""
        return next(iter(self.played.values())).groups

    def fits(self, gpu: Gpu) -> bool:
        """Whether every stage fits."""
        return not self.failed and self.reserved <= gpu.usable

    def mfu(self, architecture: Architecture, speed: Speed) -> float:
        """Share of the GPUs' peak that goes into FLOPs of the model."""
        assert self.update is not None
        config = self.candidate.config
        peak = speed.matrix_fp8 if config.fp8 else speed.matrix
        flops = flops_per_token(architecture, config.sequence_length, mtp=True) * config.tokens_per_step
        return flops / (self.update.seconds * config.parallel.processes * peak)


@dataclass(kw_only=True)
class Search:
    """What was found."""

    legal: int = 0
    too_large: int = 0  # by arithmetic of their states
    rehearsed: list[Rehearsed] = field(default_factory=list)
    ranks: int = 0  # that were played
    seconds: float = 0.0


class Planner:
    """Plans runs of one model on one kind of GPU."""

    def __init__(
        self, architecture: Architecture, base: TrainingConfig, *, gpus: int, gpu: Gpu, speed: Speed, nodes: Nodes
    ) -> None:
        """`base`: a run, but for its layout, micro batch and recomputation."""
        self.architecture, self.base, self.gpus = architecture, base, gpus
        self.gpu, self.speed, self.nodes = gpu, speed, nodes
        numbers = {kind: number for number, kind in enumerate(architecture.kinds)}
        self._kinds = [numbers[layer] for layer in architecture.layers]

    def search(self, wanted: int, said: Callable[[str], None] = lambda line: None) -> Search:
        """Rehearse, the most promising first, until so many layouts fit and no better one is in sight.

        Args:
            wanted: rows.
            said: is told how far it is.
        """
        began, found = time.monotonic(), Search()
        order = self.promising(found, said)
        fitting: list[float] = []
        while chosen := list(islice(order, min(_EACH_STEP, wanted + 1))):
            limit = sorted(fitting)[wanted - 1] * _WORSE if len(fitting) >= wanted else float("inf")
            chosen = [(seconds, each, held) for seconds, each, held in chosen if seconds <= limit]
            chosen = [row for row in chosen if not self._pointless(row[1], found.rehearsed)]
            if not chosen and limit < float("inf"):
                break
            results = self.rehearse([(each, held) for _, each, held in chosen])
            found.rehearsed += results
            found.ranks += sum(len(each.played) for each in results)
            fitting += [seconds for (seconds, _, _), each in zip(chosen, results, strict=True) if each.fits(self.gpu)]
            said(f"{len(found.rehearsed)} layouts rehearsed, {len(fitting)} fit")
            if len(found.rehearsed) >= _TRIED * wanted and fitting:
                break
        found.rehearsed.sort(key=lambda each: (not each.fits(self.gpu), each.update.seconds if each.update else 0.0))
        found.seconds = time.monotonic() - began
        return found

    def promising(
        self, found: Search, said: Callable[[str], None] = lambda line: None
    ) -> Iterator[tuple[float, Candidate, tuple[States, ...]]]:
        """Legal layouts whose states fit, by a guess of their seconds; counts the others in `found`."""
        every = list(candidates(self.base, self.architecture, self.gpus))
        found.legal = len(every)
        if not every:
            return
        sizes, usable = Sizes.of(self.architecture, self.base.sequence_length), self.gpu.usable
        hopeful = [each for each in every if least_states(sizes, each.config) <= usable]

        def promise(each: Candidate) -> float:
            """Seconds; of what is unlikely to fit more, so that it comes later, and is not left out."""
            over = max(guessed_bytes(sizes, each) / usable, 1.0)
            return guess(sizes, each, self.speed, self.nodes) * over**2

        guessed = sorted((promise(each), index) for index, each in enumerate(hopeful))
        said(f"{found.legal:,} legal layouts with their micro batches and recomputation, {len(hopeful):,} to look at")
        found.too_large = found.legal - len(hopeful)
        yield from self._that_hold(((seconds, hopeful[index]) for seconds, index in guessed), found)

    def _that_hold(
        self, ordered: Iterable[tuple[float, Candidate]], found: Search
    ) -> Iterator[tuple[float, Candidate, tuple[States, ...]]]:
        """Those whose states fit by arithmetic."""
        for seconds, each in ordered:
            held = self.held(each.parallel)
            if max(stage.total for stage in held) > self.gpu.usable:
                found.too_large += 1
                continue
            yield seconds, each, held

    def _pointless(self, candidate: Candidate, earlier: Sequence[Rehearsed]) -> bool:
        """Whether a layout fits with less recomputation, or does not with a smaller micro batch and as much recomputation."""
        for other in earlier:
            if other.candidate.parallel != candidate.parallel:
                continue
            one, two = other.candidate, candidate
            same_size = one.config.micro_batch_size == two.config.micro_batch_size
            if other.fits(self.gpu) and same_size:
                return True
            smaller = one.config.micro_batch_size <= two.config.micro_batch_size
            if not other.fits(self.gpu) and one.recompute == two.recompute and smaller:
                return True
        return False

    def held(self, parallel: ParallelConfig) -> tuple[States, ...]:
        """States of each stage, by arithmetic."""
        return of_stages(replace(self.base, parallel=parallel), self.architecture)

    def stages(self, parallel: ParallelConfig) -> list[int]:
        """Stages to play: the first, the last, and of stages with the same layers the first, which keeps most micro batches."""
        shares = parallel.pipeline_layers or (len(self._kinds) // parallel.chunks,) * parallel.chunks
        layers: list[list[tuple[int, ...]]] = [[] for _ in range(parallel.pipeline)]
        first = 0
        for chunk, share in enumerate(shares):
            layers[chunk % parallel.pipeline].append(tuple(self._kinds[first : first + share]))
            first += share
        seen = {tuple(chunks): stage for stage, chunks in reversed([*enumerate(layers)])}
        return sorted({0, parallel.pipeline - 1, *seen.values()})

    def rehearse(
        self,
        chosen: Sequence[tuple[Candidate, tuple[States, ...]]],
        *,
        timed: bool = True,
        stages: Callable[[ParallelConfig], Iterable[int]] | None = None,
    ) -> list[Rehearsed]:
        """Play the stages of candidates.

        Args:
            timed: count what they compute, which takes as long as playing, for `update`.
            stages: to play, of a layout; by default `self.stages`.
        """
        began = time.monotonic()
        work = {
            (index, stage): partial(
                rehearse.play,
                self.run(each.config),
                stage * each.parallel.processes // each.parallel.pipeline,
                rehearse.UNLIMITED,
                quiet=True,
                names=False,
                work=Work(self.speed) if timed else None,
            )
            for index, (each, _) in enumerate(chosen)
            for stage in (stages or self.stages)(each.parallel)
        }
        found = in_forks(work, at_once=_cores(), returned=UserError)
        seconds = (time.monotonic() - began) / max(len(chosen), 1)
        return [
            self._rehearsed(each, held, {stage: found[i, stage] for i, stage in work if i == index}, seconds, timed)
            for index, (each, held) in enumerate(chosen)
        ]

    def _rehearsed(
        self, candidate: Candidate, held: tuple[States, ...], found: Mapping[int, Any], seconds: float, timed: bool
    ) -> Rehearsed:
        played = {stage: each for stage, each in found.items() if isinstance(each, Played)}
        failed = next((str(each) for each in found.values() if not isinstance(each, Played)), "")
        config = rehearse.shortened(candidate.config)
        update = None
        if timed and not failed:
            stages = [stage_time(each, config.micro_batches, self.speed, self.nodes) for each in played.values()]
            update = update_time(stages, candidate.config)
        return Rehearsed(candidate=candidate, held=held, played=played, update=update, failed=failed, seconds=seconds)

    def run(self, config: TrainingConfig) -> loop.Run:
        """A run of this configuration without weights and data."""
        nowhere = Path(os.devnull)
        source = _NoWeights(path=nowhere, kind="megatron", manifest=None)
        return loop.Run(
            config=replace(rehearse.shortened(config), backend="local"),
            inputs=Inputs(source=source, data=(), architecture=self.architecture),
            target=nowhere,
            overwrite=False,
            extend=False,
            blend=Blend.of(["zeros"], [1], None),
            order="permutation",
            datasets=lambda order: (Zeros(config.sequence_length), None),
            packed=False,
            track=(),
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0))
