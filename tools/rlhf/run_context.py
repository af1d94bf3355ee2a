"""What every training command does around its loop: hold the target, keep resumable state, stop on a signal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from shared.checkpoint.directory.manifest import Inputs
from shared.checkpoint.directory.publish import Publication, publish
from shared.errors import EXIT_DONE, EXIT_USAGE, AlreadyDone, UserError
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.state import State


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """An open run: the directory to publish and the state to resume from."""

    out: Publication | None
    """The directory in the making; on rank 0 only."""
    state: State


@contextmanager
def open_run(distributed: DistributedContext, target: Path, inputs: Inputs, *, overwrite: bool) -> Iterator[RunContext]:
    """Hold `target` and its state for this job; publish when the block ends well, then drop the state.

    Rank 0 decides whether the job may run. When it may not, rank 0 says why and the other ranks leave in silence, with
    the same exit code.
    """
    if distributed.rank != 0:
        refusal = distributed.broadcast(None)
        if refusal is not None:
            raise SystemExit(refusal)
        yield RunContext(out=None, state=State.open(target, inputs, overwrite=True))
        return
    announced = False
    try:
        with publish(target, kind="hf", inputs=inputs, overwrite=overwrite) as out:
            state = State.open(target, inputs, overwrite=overwrite)
            distributed.broadcast(None)
            announced = True
            yield RunContext(out=out, state=state)
    except (AlreadyDone, UserError) as refused:
        if not announced:
            distributed.broadcast(EXIT_DONE if isinstance(refused, AlreadyDone) else EXIT_USAGE)
        raise
    state.remove()


class StopRequest:
    """SIGTERM or SIGUSR1 asks the loop to save its state and leave at the end of the step at hand."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def check_batches(*, global_batch_size: int, micro_batch_size: int, distributed: DistributedContext) -> None:
    """UserError unless an update is a whole number of forward passes of every process."""
    if global_batch_size % (micro_batch_size * distributed.world_size):
        raise UserError(
            f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size {micro_batch_size} times "
            f"{distributed.world_size} process(es)"
        )
