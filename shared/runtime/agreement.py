"""What ranks agree on: the result or the exit code of a function called on rank 0, and whether something holds everywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shared.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, AlreadyDone, Interrupted, UserError


def on_rank_0[T](function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and broadcast its result, which must be picklable.

    An exception propagates on rank 0; the other ranks exit silently with its exit code.
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


def on_every_rank(value: bool, device: torch.device) -> bool:
    """Whether `value` is true on every rank. Collective: every rank calls it, with its own device."""
    if torch.distributed.get_world_size() == 1:
        return value
    agreed = torch.tensor(int(value), device=device)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN)
    return bool(agreed.item())


def _exit_code(error: BaseException) -> int:
    for kind, code in ((AlreadyDone, EXIT_DONE), (UserError, EXIT_USAGE), (Interrupted, EXIT_INTERRUPTED)):
        if isinstance(error, kind):
            return code
    return EXIT_FAILED
