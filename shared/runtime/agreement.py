"""What the ranks of a run must agree on: what the first rank did, and when to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

import torch

from shared.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, AlreadyDone, Interrupted, UserError


def on_first_rank[T](function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and give its result, which must be picklable, to every rank.

    An exception leaves rank 0 as it is and ends the other ranks quietly, with the exit code it stands for.
    """
    if torch.distributed.get_rank() == 0:
        try:
            outcome = ("value", function())
        except BaseException as error:
            torch.distributed.broadcast_object_list([("exit", _exit_code(error))], src=0)
            raise
        torch.distributed.broadcast_object_list([outcome], src=0)
        return outcome[1]
    received: list[tuple[str, T | int]] = [("exit", EXIT_FAILED)]
    torch.distributed.broadcast_object_list(received, src=0)
    kind, value = received[0]
    if kind == "exit":
        raise SystemExit(value)
    return value  # type: ignore[return-value]


def _exit_code(error: BaseException) -> int:
    for kind, code in ((AlreadyDone, EXIT_DONE), (UserError, EXIT_USAGE), (Interrupted, EXIT_INTERRUPTED)):
        if isinstance(error, kind):
            return code
    return EXIT_FAILED


class StopRequest:
    """SIGTERM and SIGUSR1 ask for a stop; the loop takes notice between two updates."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked: the same answer on all ranks, so that all of them save."""
        if torch.distributed.get_world_size() == 1:
            return self._asked
        asked = torch.tensor(int(self._asked), device=device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked.item())
