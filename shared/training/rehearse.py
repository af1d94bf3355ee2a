"""`--rehearse`: plays the ranks of a run without their GPUs, and says whether it fits and hangs together.

The command runs again in a process whose CUDA runtime is stubs (`shared.rehearsal`), and forks into ranks. A rank is the training
loop itself, for two updates: with the checkpoint's names and shapes in place of its bytes, and nothing in place of the target.
`fake_world.before_forking` comes before the import of this module.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

from shared.console import quantity
from shared.errors import StageError, UserError
from shared.model import weights
from shared.model.gpt import LanguageModel
from shared.rehearsal import fake_world, launch_map
from shared.rehearsal.collectives import Record, match
from shared.rehearsal.forks import Failed, in_forks
from shared.rehearsal.launch_map import Nodes
from shared.rehearsal.machine import RESERVE, Gpu
from shared.rehearsal.memory import Watch
from shared.rehearsal.reexecute import LIMIT
from shared.rehearsal.work import Work
from shared.runtime import progress
from shared.training import loop
from shared.training.config import TrainingConfig
from shared.training.loss import Loss
from shared.training.recorder import Recorder, SharedRunDirectory
from shared.training.rehearsal_report import TRAINING, UPDATES, Played, lines, stage_of
from shared.training.storage import Storage

UNLIMITED = 1 << 44  # bytes: a rank that does not fit is played again with these, to say what it needs


def rehearse(run: loop.Run, gpu: Gpu, *, all_ranks: bool, nodes: Nodes) -> None:
    """Play the ranks of `run` and print what each needs.

    Args:
        run: as for `loop.train`.
        gpu: each rank's.
        nodes: where the ranks are, for the launch map.
        all_ranks: every rank; else the first of each pipeline stage. The others of a stage have as much to do.

    Raises:
        UserError: it does not fit, or does not match; or the run is refused, as `loop.train` would.
        StageError: a rank failed otherwise.
    """
    given, config = run.config, shortened(run.config)
    parallel = config.parallel
    run = replace(run, config=config)
    ranks = range(0, parallel.processes, 1 if all_ranks else parallel.processes // parallel.pipeline)
    played = _play(run, dict.fromkeys(ranks, config), gpu.usable)
    short = {rank: config for rank, each in played.items() if each.out_of_memory}
    whole = played | _play(run, short, UNLIMITED, quiet=True)
    check_names(run, whole.values(), all_ranks)
    matched = match({rank: each.operations for rank, each in whole.items()})
    results = {
        rank: replace(each, out_of_memory=played[rank].out_of_memory, where=played[rank].where)
        for rank, each in whole.items()
    }
    *report, validity = lines(results, config, gpu, matched)
    places = launch_map.lines(whole[0].groups, nodes, experts=run.inputs.architecture.moe is not None)
    print("\n".join([*report, *places, validity]), flush=True)
    if short:
        _refuse(run, given, results, gpu)
    if matched.mismatch:
        raise UserError(f"--rehearse: ranks do not match, and would hang or fail: {matched.mismatch}")


def _refuse(run: loop.Run, given: TrainingConfig, results: dict[int, Played], gpu: Gpu) -> NoReturn:
    """UserError that names the rank that needs most, where it ran out of memory, and what was rehearsed to mend it."""
    short = [each for each in results.values() if each.out_of_memory]
    worst = max(short, key=lambda each: each.reserved)
    phase, module = worst.where
    at = f"in {phase}" + (f", in {module}" if module else "")
    raise UserError(
        f"--rehearse: rank {worst.rank} (pipeline stage {stage_of(worst.rank, given)}) does not fit on {gpu.title}: it needs "
        f"{quantity(worst.reserved, 'bytes')} and has {quantity(gpu.usable, 'bytes')}, "
        f"{quantity(RESERVE, 'bytes')} less than the GPU; out of memory {at}; give {_mend(run, given, short, gpu)}"
    )


def _mend(run: loop.Run, given: TrainingConfig, short: list[Played], gpu: Gpu) -> str:
    """Flags with which the ranks that do not fit do."""
    held = any(each.states >= gpu.usable for each in short)
    for flags, config in mends(given):
        if held and not config.offload_optimizer:  # it saves activations only
            continue
        try:
            found = _play(run, {each.rank: shortened(config) for each in short}, gpu.usable, quiet=True)
        except UserError:  # such a run is refused
            continue
        if not any(each.out_of_memory for each in found.values()):
            needed = quantity(max(each.reserved for each in found.values()), "bytes")
            return f"{flags}, which was rehearsed and needs {needed}"
    moe = run.inputs.architecture.moe is not None
    wider = ["--tensor-parallel", "--pipeline-parallel", *["--expert-parallel"] * moe]
    adapters = "" if given.lora else ", or --lora-rank"
    return f"a larger {', '.join(wider[:-1])} or {wider[-1]}, a GPU with more memory{adapters}"


def mends(config: TrainingConfig) -> Iterator[tuple[str, TrainingConfig]]:
    """Changes that save memory, and the flags that make them; what costs least time first."""
    parallel = config.parallel
    smaller = [size for size in range(config.micro_batch_size - 1, 0, -1) if config.micro_batch_size % size == 0]
    for size in smaller:
        yield f"--micro-batch-size {size}", replace(config, micro_batch_size=size)
    spread = parallel.tensor > 1 and not parallel.sequence_parallel
    if spread:
        by_sequence = replace(parallel, sequence_parallel=True)
        with contextlib.suppress(UserError):  # the sequence does not divide
            yield "--sequence-parallel", replace(config, parallel=by_sequence)
    if "full" not in config.recompute:
        for kind in ("selective", "full"):
            if kind not in config.recompute:
                yield f"--recompute {kind}", replace(config, recompute=(kind,))
        if smaller:
            changed = replace(config, recompute=("full",), micro_batch_size=1)
            yield "--recompute full --micro-batch-size 1", changed
    if not config.offload_optimizer and not config.async_save:
        yield "--offload-optimizer", replace(config, offload_optimizer=True)
        least = replace(config, offload_optimizer=True, recompute=("full",), micro_batch_size=1)
        if least.recompute != config.recompute or smaller:
            smallest = " --micro-batch-size 1" if smaller else ""
            yield f"--offload-optimizer --recompute full{smallest}", least


def shortened(config: TrainingConfig) -> TrainingConfig:
    """The same updates, but two, of as few micro batches as reach the peak: those in flight in the pipeline."""
    parallel = config.parallel
    enough = 2 * parallel.pipeline if parallel.virtual_pipeline > 1 else max(parallel.pipeline, 2)
    micro_batches = min(config.micro_batches, enough)
    return replace(
        config,
        steps=UPDATES,
        save_every=UPDATES + 1,
        keep_best=False,
        early_stop=None,
        schedule="constant",
        min_learning_rate=config.learning_rate,
        warmup_steps=0,
        decay_steps=0,
        global_batch_size=micro_batches * config.micro_batch_size * parallel.data,
        validation_sequences=min(
            config.validation_sequences, config.micro_batch_size * parallel.data * parallel.pipeline
        ),
    )


def _play(run: loop.Run, configs: dict[int, TrainingConfig], limit: int, *, quiet: bool = False) -> dict[int, Played]:
    """Play each rank with its configuration and so many bytes of memory. `quiet`: without the loop's log lines."""
    work = {
        rank: partial(play, replace(run, config=config), rank, limit, quiet=quiet) for rank, config in configs.items()
    }
    found = in_forks(work, at_once=len(os.sched_getaffinity(0)), returned=UserError)
    for rank, each in found.items():
        if isinstance(each, UserError):
            raise each
        if isinstance(each, Failed):
            sys.stderr.write("".join(f"[rank {rank}] {line}\n" for line in each.trace.splitlines()))
            raise StageError(f"--rehearse: rank {rank}: {each.line}")
    return found  # type: ignore[return-value]


class _Enough(BaseException):
    """Ends the loop: all updates were played."""


def play(
    run: loop.Run, rank: int, limit: int, *, quiet: bool = False, names: bool = True, work: Work | None = None
) -> Played:
    """Be `rank`, in a process of its own that may allocate `limit` bytes.

    Args:
        run: as for `loop.train`.
        rank: of the world.
        limit: bytes.
        quiet: without the loop's log lines.
        names: read names and shapes of the source's tensors.
        work: counts what is computed in the last update.
    """
    os.environ[LIMIT] = str(limit)
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    fake_world.join(rank, run.config.parallel.processes)
    if run.config.fp8:
        fake_world.launch_nothing()
    player = _Player(rank, names, work)
    progress.listen(player.begin)
    out_of_memory = ""
    try:
        with player.record:
            loop.train(replace(run, storage=player.storage))
    except _Enough:
        pass
    except torch.OutOfMemoryError as error:
        out_of_memory = str(error).partition(" GPU 0 ")[0]
    player.watch.end()
    return Played(
        rank=rank,
        phases=player.watch.phases,
        kept=player.watch.kept,
        operations=player.record.operations,
        shapes=player.shapes,
        out_of_memory=out_of_memory,
        where=(player.where, player.watch.module()) if out_of_memory else ("", ""),
        held=player.held,
        work={} if work is None else work.phases,
        groups=fake_world.groups if rank == 0 else (),  # the same on every rank
    )


class _Player:
    """What a rank does beside training: it watches, and stands in for the disk."""

    def __init__(self, rank: int, names: bool, work: Work | None = None) -> None:
        self.names, self._work = names, work
        self.held: dict[str, int] = {}
        self.rank, self.watch, self.record = rank, Watch(), Record(rank)
        self.record.module = self.watch.module
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.update = 1
        self.storage = Storage(open_run=self._open_run, read_weights=self._read_weights, recorder=self._recorder)

    def begin(self, phase: str) -> None:
        self.where = phase if phase in _BEFORE_UPDATES else f"{phase} of update {self.update}"
        self.watch.begin(self.where)
        self.record.phase = self.where
        last = phase not in _BEFORE_UPDATES and self.update == UPDATES
        self.record.work = self._work if last else None  # counting takes as long as playing
        self.watch.measuring = last and phase == TRAINING

    def _open_run(self, target: Path, *inputs: Any, **named: Any) -> SharedRunDirectory:
        return SharedRunDirectory(target, None, None)

    def _read_weights(self, chunks: Sequence[LanguageModel], iteration_path: Path, source: Path) -> None:
        if self.names:
            self.shapes = weights.wanted_shapes(chunks, weights.saved_shapes(iteration_path))
        allocate_as_loading(chunks)
        self.watch.watch(chunks)

    def _recorder(self, *given: Any, **named: Any) -> Recorder:
        return _Counter(self)


def allocate_as_loading(chunks: Sequence[LanguageModel]) -> None:
    """Allocate what `weights.load` does on the GPU. Tensors are read into the weights themselves, but for those that are stored
    in parts, as gate and up projection: Megatron-Core joins the parts of all of them before they are copied.
    """
    sharded, _, factories = load_preprocess(weights.sharded_state_dict(chunks))
    loaded = dict_list_map_outplace(lambda each: each.data if isinstance(each, ShardedTensor) else each, sharded)
    apply_factory_merges(loaded, factories)


_BEFORE_UPDATES = (
    *("joining the other ranks", "opening the run directory", "opening the data", "building the model", "loading"),
    "validation",
)


class _Counter(Recorder):
    """Counts the updates, and records nothing."""

    def __init__(self, player: _Player) -> None:
        self._player = player

    def holds(self, parts: Mapping[str, int]) -> None:
        self._player.held = dict(parts)

    def updated(self, step: int, *numbers: Any) -> None:
        self._player.update = step + 1
        if step == UPDATES:
            raise _Enough

    def validated(self, step: int, result: Loss | None, bytes_per_token: float | None) -> None:
        pass

    def close(self) -> None:
        pass

    def last_saved(self) -> str:
        return "nothing is saved in a rehearsal"


def check_names(run: loop.Run, played: Any, all_ranks: bool) -> None:
    """Compare names and shapes of the model with those of the source. UserError for what does not fit."""
    path = run.inputs.source.iteration_path
    saved = weights.saved_shapes(path)
    wanted = {key: shape for each in played for key, shape in each.shapes.items()}
    if not all_ranks and run.config.parallel.expert > 1:  # experts of the ranks that are not played
        forms = {_any_expert(key): shape for key, shape in wanted.items()}
        wanted |= {key: forms[_any_expert(key)] for key in saved if _any_expert(key) in forms}
    weights.check_shapes(wanted, saved, run.inputs.architecture, path)


def _any_expert(key: str) -> str:
    return re.sub(r"(\.experts\.experts\.)\d+", r"\1*", key)
