"""Rank 0 decides: all ranks get its value or its error."""

from __future__ import annotations

from collections.abc import Callable


def test_rank_0s_value_or_exit_code_is_every_ranks(two_ranks: Callable[[str], list[str]]) -> None:
    lines = two_ranks("""
print(rank, on_rank_0(lambda: {"rank": rank}), flush=True)
for kind in (AlreadyDone, UserError, Interrupted, OSError):
    def refuse():
        raise kind("no")
    try:
        on_rank_0(refuse)
    except BaseException as error:
        print(rank, type(error).__name__, error, flush=True)
""")
    assert [line for line in lines if line[0] == "0"] == [
        "0 {'rank': 0}", "0 AlreadyDone no", "0 UserError no", "0 Interrupted no", "0 OSError no"
    ]  # fmt: skip
    assert [line for line in lines if line[0] == "1"] == [
        "1 {'rank': 0}", "1 SystemExit 0", "1 SystemExit 2", "1 SystemExit 75", "1 SystemExit 1"
    ]  # fmt: skip
    assert lines[-1] == "[0, 0]"
