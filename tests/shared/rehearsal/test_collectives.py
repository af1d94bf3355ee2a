"""Ranks whose communication matches, and each way in which it does not."""

import pytest

from shared.rehearsal.collectives import Operation, match

TP, DP = ("TP", (0, 1)), ("DP", (0, 2))


def operation(kind: str, group: tuple[str, tuple[int, ...]], size: int = 64, **fields) -> Operation:
    return Operation(kind=kind, group=group[0], members=group[1], size=size, module="decoder.layers.3.mlp", **fields)


def message(kind: str, sender: int, receiver: int, size: int = 8) -> Operation:
    return operation(kind, ("PP", (sender, receiver)), size)


def mismatch(recorded: dict[int, list[Operation]]) -> str | None:
    return match(recorded).mismatch


def test_equal_orders_match_in_each_group() -> None:
    """The order of operations of different groups may differ."""
    gather, reduce = operation("_allgather_base_", TP), operation("allreduce_", DP)
    found = match({0: [gather, reduce, gather], 1: [gather, gather], 2: [reduce]})
    assert (found.operations, found.groups, found.mismatch) == (6, 2, None)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (["allreduce_", "allgather_"], "operation 1 of group TP is allgather of 64 bytes"),
        (["allgather_"], "rank 0 has 2 operations and rank 1 1; the first without a partner is allreduce of 64 bytes"),
        (
            ["allgather_", "allreduce_", "barrier"],
            "without a partner is barrier of 64 bytes in decoder.layers.3.mlp on rank 1",
        ),
        ([], "rank 0 has 2 operations and rank 1 0"),
    ],
)
def test_another_order_or_number_is_found(second, said) -> None:
    first = [operation("allgather_", TP), operation("allreduce_", TP)]
    assert said in mismatch({0: first, 1: [operation(kind, TP) for kind in second]})


def test_another_size_is_found() -> None:
    found = mismatch({0: [operation("allreduce_", TP)], 1: [operation("allreduce_", TP, 32)]})
    assert found == (
        "operation 1 of group TP is allreduce of 64 bytes in decoder.layers.3.mlp on rank 0 and allreduce of 32 bytes in "
        "decoder.layers.3.mlp on rank 1"
    )


def test_ranks_that_are_not_played_are_not_missed() -> None:
    assert mismatch({0: [operation("allreduce_", DP), message("send", 0, 4)]}) is None


def test_every_message_has_its_receiver() -> None:
    sent, received = message("send", 0, 2), message("recv_", 0, 2)
    assert mismatch({0: [sent, sent], 2: [received, received]}) is None
    assert (
        mismatch({0: [sent, sent], 2: [received]})
        == "rank 0 sends 2 messages to rank 2, which receives 1 from it, in PP"
    )
    assert mismatch({0: [], 2: [received]}) == "rank 0 sends 0 messages to rank 2, which receives 1 from it, in PP"
    assert "message 1 from rank 0 (8 bytes) to rank 2 (4 bytes)" in mismatch(
        {0: [sent], 2: [message("recv_", 0, 2, 4)]}
    )
    assert mismatch({0: [sent], 2: [message("recv_", 2, 0)]}) is not None  # the other direction


def test_rows_sent_are_rows_received() -> None:
    """An all-to-all of two ranks, with other numbers of rows in each direction."""

    def exchange(sent: tuple[int, ...], received: tuple[int, ...]) -> list[Operation]:
        return [operation("alltoall_base_", TP, 0, sent=sent, received=received)]

    assert mismatch({0: exchange((1, 2), (1, 3)), 1: exchange((3, 4), (2, 4))}) is None
    assert "alltoall_base of 3 rows" in mismatch({0: exchange((1, 2), (1, 3)), 1: exchange((3, 4), (1, 4))})
    assert mismatch({0: exchange((1, 2), (1, 2)), 1: exchange((3, 4), (2, 4))}) is not None
