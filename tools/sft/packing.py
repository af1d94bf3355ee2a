"""Packs conversations into rows of a fixed length without cutting any."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`; the lengths in a row sum to at most `capacity` tokens.

    Best-fit decreasing: in order of falling length, each into the fullest row with enough room. At most
    11/9 * optimum + 1 rows. Deterministic in the lengths and their order.
    """
    assert all(0 < length <= capacity for length in lengths), "a conversation does not fit in a row"
    rows: list[list[int]] = []
    by_room: list[deque[int]] = [deque() for _ in range(capacity + 1)]  # rows by free tokens
    rooms = 0  # bit r: by_room[r] is not empty; finds the smallest sufficient room without a search
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
