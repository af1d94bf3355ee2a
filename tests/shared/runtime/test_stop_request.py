"""A signal to one rank stops all ranks at the same step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
import torch

from shared.runtime.stop_request import StopRequest


def test_a_signal_to_one_rank_is_every_ranks(two_ranks: Callable[[str], list[str]]) -> None:
    lines = two_ranks("""
cpu = torch.device("cpu")
for number in (signal.SIGTERM, signal.SIGUSR1):
    stop = StopRequest()
    before = stop.agreed(cpu)
    if rank == 1:
        os.kill(os.getpid(), number)
    print(rank, before, stop.agreed(cpu), flush=True)
""")
    assert sorted(lines[:-1]) == ["0 False True"] * 2 + ["1 False True"] * 2
    assert lines[-1] == "[0, 0]"


def test_what_was_asked_in_an_update_is_answered_after_it(two_ranks: Callable[[str], list[str]]) -> None:
    """A signal between the two is in the next answer."""
    lines = two_ranks("""
from shared.runtime.device import select_device
device = select_device()
stop, found = StopRequest(), []
for update in range(3):
    stop.ask(device)
    if rank == 1 and update == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    found.append(stop.answer())
print(rank, *found, flush=True)
""")
    assert sorted(lines[:-1]) == ["0 False False True", "1 False False True"]
    assert lines[-1] == "[0, 0]"


def test_one_process_answers_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    received = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop = StopRequest()
        stop.ask(torch.device("cpu"))
        assert not stop.answer()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.answer()
    finally:
        for number, handler in received.items():
            signal.signal(number, handler)
