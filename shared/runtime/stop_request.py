"""Stop requests: SIGTERM or SIGUSR1 asks a training loop to save its state and end."""

from __future__ import annotations

import signal
from types import FrameType

import torch


class StopRequest:
    """Records SIGTERM and SIGUSR1 of this process; the loop polls `agreed` after every update."""

    def __init__(self) -> None:
        self._received = False
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
