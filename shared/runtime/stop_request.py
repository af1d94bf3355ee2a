"""Stop requests: SIGTERM or SIGUSR1 asks a training loop to save its state and end."""

from __future__ import annotations

import signal
from types import FrameType

import torch


class StopRequest:
    """Records SIGTERM and SIGUSR1 of this process. Loops poll `agreed` after every update, or `ask` in it and read `answer`."""

    def __init__(self) -> None:
        self._received = False
        self._answer: tuple[torch.Tensor, torch.cuda.Event] | None = None  # a host's copy, and when it is there
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank received a signal (all-reduced, so that all ranks save).

        Collective: every rank calls it, with its own device.
        """
        if torch.distributed.get_world_size() == 1:
            return self._received
        received = torch.tensor(int(self._received), device=device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return bool(received.item())

    def ask(self, device: torch.device) -> None:
        """Begin to agree, as in `agreed`: its reduction and copy to the host are queued, and the host does not wait for them."""
        if torch.distributed.get_world_size() == 1:
            return
        received = torch.full((), int(self._received), device=device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        answer, there = torch.empty_like(received, device="cpu", pin_memory=True), torch.cuda.Event()
        answer.copy_(received, non_blocking=True)
        there.record()
        self._answer = answer, there

    def answer(self) -> bool:
        """What was agreed since `ask`. It waits for what was queued before `ask`, and not for what was queued after."""
        if self._answer is None:
            return self._received
        answer, there = self._answer
        there.synchronize()
        return bool(answer)
