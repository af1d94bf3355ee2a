"""Packing conversations into rows of a fixed length, never cutting one, with as little padding as is quickly found."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each row's sum at most `capacity` tokens.

    The longest goes first, each into the fullest row that still has room (best-fit decreasing: at most 11/9 of the
    smallest number of rows, and one). The outcome depends on the lengths and their order only.
    """
    assert all(0 < length <= capacity for length in lengths), "a conversation does not fit in a row"
    rows: list[list[int]] = []
    by_room: list[deque[int]] = [deque() for _ in range(capacity + 1)]  # rows by the tokens still free in them
    rooms = 0  # bit r is set while by_room[r] is not empty: the next larger room is found without a search
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].popleft()
            if not by_room[room]:
                rooms &= ~(1 << room)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
