"""Packing: nothing lost, no row above capacity, exactly the rows of best-fit decreasing."""

import random

import pytest

from tools.sft.packing import best_fit_decreasing


@pytest.mark.parametrize("seed", range(20))
def test_every_length_is_packed_once_and_rows_fit(seed: int) -> None:
    chance = random.Random(seed)
    capacity = chance.randint(1, 300)
    lengths = [chance.randint(1, capacity) for _ in range(chance.randint(1, 400))]
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    # At most one row is less than half full, or its content would have gone into another.
    assert sum(2 * sum(lengths[index] for index in row) <= capacity for row in rows) <= 1
    assert best_fit_decreasing(lengths, capacity) == rows


@pytest.mark.parametrize("seed", range(10))
def test_it_is_best_fit_decreasing(seed: int) -> None:
    """Against the definition, written plainly."""
    chance = random.Random(seed)
    lengths = [chance.randint(1, 60) for _ in range(200)]
    room: list[int] = []
    counts: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, free in enumerate(room) if free >= length]
        if fitting:
            best = min(fitting, key=lambda i: room[i])
            room[best] -= length
            counts[best] += 1
        else:
            room.append(100 - length)
            counts.append(1)
    rows = best_fit_decreasing(lengths, 100)
    assert sorted(100 - sum(lengths[i] for i in row) for row in rows) == sorted(room)
    assert len(rows) == len(counts)


def test_a_perfect_packing_is_found() -> None:
    assert best_fit_decreasing([6, 4, 5, 5, 7, 3], 10) == [[4, 5], [0, 1], [2, 3]]
