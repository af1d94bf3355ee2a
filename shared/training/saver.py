"""Saves of a run: blocking, or written by forked processes while training goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from shared.console import log
from shared.runtime import progress
from shared.runtime.agreement import on_every_rank
from shared.training import state
from shared.training.background_writer import BackgroundWriter
from shared.training.best import Best
from shared.training.config import TrainingConfig
from shared.training.recorder import Recorder, SharedRunDirectory

_POLL_SECONDS = 0.05
_TOLD_SECONDS = 0.1


@dataclass(kw_only=True)
class _InFlight:
    """A save that is not published yet."""

    step: int
    written: Path
    facts: dict[str, Any]  # as of that update
    protected: int | None  # an older iteration that is kept
    request: AsyncRequest
    writer: BackgroundWriter
    published: bool = False  # all writers have ended, and the publication has begun


class Saver:
    """Saves the state of a run and publishes it. Every rank calls every method.

    With `config.async_save` a save is written by a forked process of each rank. It is published, as a blocking one is, when
    the writers of all ranks have ended, at the `poll` after that. There is at most one at a time. A last save is blocking.

    As a context manager: at an error of a single process the save in flight is completed; with several ranks, of which
    only some may have the error, it is given up and its writers are killed.
    """

    def __init__(
        self,
        config: TrainingConfig,
        directory: SharedRunDirectory,
        recorder: Recorder,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        device: torch.device,
    ) -> None:
        self._config, self._directory, self._recorder = config, directory, recorder
        self._model, self._optimizer, self._device = model, optimizer, device
        self._in_flight: _InFlight | None = None

    def save(self, step: int, *, finished: bool, last: bool, best: Best | None = None) -> None:
        """Save the state after update `step`.

        Args:
            step: updates done.
            finished: whether the run ends with it.
            last: whether this process ends after it: the save is blocking.
            best: the lowest validation loss so far, for the manifest; with `config.keep_best` its iteration is kept.

        Raises:
            StageError: this save, or the one before it, could not be written.
        """
        progress.at(f"saving update {step}", long=True)
        self.finish(announced=not last)
        self._recorder.saving()
        written, facts = self._directory.begin(step), self._recorder.facts(step)
        facts |= best.facts() if best else {}
        protected = best.iteration if best and self._config.keep_best else None
        if self._config.async_save and not last:
            request = state.describe(written, self._model, self._optimizer, step=step)
            writer = BackgroundWriter(request, written)
            self._in_flight = _InFlight(
                step=step, written=written, facts=facts, protected=protected, request=request, writer=writer
            )
            return
        state.save(written, self._model, self._optimizer, step=step)
        self._directory.commit(
            written, step, facts=facts, finished=finished, keep=self._config.keep, protected=protected
        )
        self._recorder.saved(step)

    def poll(self) -> bool:
        """Publish the save in flight if the writers of all ranks have ended. Returns whether none is left in flight.

        Two polls see it through: one begins the publication, which rank 0 does in a thread, and a later one ends it.
        """
        save = self._in_flight
        if save is None:
            return True
        if not on_every_rank(save.writer.ended() and self._directory.committed(), self._device):
            return False
        self._in_flight = None  # also after an error
        if not save.published:
            with state.failures_named(save.written, save.step):
                for complete in save.request.finalize_fns:
                    complete()
            self._directory.begin_commit(
                save.written,
                save.step,
                facts=save.facts,
                keep=self._config.keep,
                protected=save.protected,
                hashed=save.writer.entries,
            )
            save.published, self._in_flight = True, save
            return False
        self._directory.finish_commit()
        self._recorder.saved(save.step)
        return True

    def finish(self, *, announced: bool = False) -> None:
        """Wait for the save in flight and publish it. `announced`: say how long it took, if it was not done."""
        save, began = self._in_flight, time.monotonic()
        if self.poll() or save is None:
            return
        progress.at(f"waiting for the save of update {save.step}", long=True)
        while not self.poll():
            time.sleep(_POLL_SECONDS)
        waited = time.monotonic() - began
        if announced and waited > _TOLD_SECONDS:
            log(
                f"training waited {waited:.1f} s for the save of update {save.step}, "
                "which was still being written; a higher --save-every avoids it"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._in_flight is None:
            return
        if isinstance(error, Exception) and torch.distributed.get_world_size() == 1:
            self.finish()
        else:
            self._in_flight.writer.kill()
            self._in_flight = None
