"""A signal to one rank stops all ranks at the same step."""

from __future__ import annotations

from collections.abc import Callable


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
