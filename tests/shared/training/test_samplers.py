"""The sample order: a function of seed and step, independent of the layout."""

import numpy as np
import pytest

from shared.training.samplers import TABLE_ITEMS, Shuffle, batch_positions, default_order, permutation, scattered


def positions_of_a_step(step: int, *, global_batch_size: int, micro_batch_size: int, ranks: int) -> list[int]:
    micro_batches = global_batch_size // (micro_batch_size * ranks)
    return [
        int(position)
        for rank in range(ranks)
        for micro_batch in range(micro_batches)
        for position in batch_positions(
            first=step * global_batch_size,
            micro_batch=micro_batch,
            micro_batch_size=micro_batch_size,
            rank=rank,
            ranks=ranks,
        )
    ]


def test_a_global_batch_is_the_same_samples_in_every_layout():
    for ranks, micro_batch_size in ((1, 1), (1, 8), (2, 2), (4, 2), (8, 1)):
        found = positions_of_a_step(3, global_batch_size=8, micro_batch_size=micro_batch_size, ranks=ranks)
        assert sorted(found) == list(range(24, 32))


def test_the_order_depends_on_seed_epoch_and_stream_only():
    first = permutation(1, 0, 1000)
    assert np.array_equal(first, permutation(1, 0, 1000))
    others = [permutation(2, 0, 1000), permutation(1, 1, 1000), permutation(1, 0, 1000, stream=1)]
    assert not any(np.array_equal(first, other) for other in others)
    assert sorted(first) == list(range(1000))


def test_the_order_is_pinned():
    """Another order after an upgrade of numpy would make a resumed run repeat and skip samples."""
    assert permutation(7, 3, 10).tolist() == PINNED


PINNED = [0, 9, 3, 6, 5, 1, 8, 7, 4, 2]


@pytest.mark.parametrize("length", [1, 2, 3, 16, 1000, 4097])
def test_the_computed_order_has_every_item_once(length: int):
    assert sorted(scattered(5, 2, length, 1, np.arange(length))) == list(range(length))


def test_the_computed_order_is_random_enough():
    """Means and correlations over 65,536 places: a standard error is 1/256; within four of it."""
    length = 1 << 22
    first = scattered(1, 0, length, 1, np.arange(1 << 16)) / length
    assert abs(first.mean() - 0.5) < 4 * 12**-0.5 / 256
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / 256
    for other in ((2, 0, 1), (1, 1, 1), (1, 0, 2)):
        seed, epoch, stream = other
        second = scattered(seed, epoch, length, stream, np.arange(1 << 16)) / length
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / 256
    expected = (1 << 16) / 64
    squares = (np.histogram(first, 64, (0, 1))[0] - expected) ** 2 / expected
    assert 63 - 4 * 126**0.5 < squares.sum() < 63 + 4 * 126**0.5  # chi-squared, 63 degrees of freedom


def test_both_orders_are_pinned():
    table, computed = (Shuffle(order, 7, 10, 0) for order in ("permutation", "scattered"))
    table(4, 0)  # an epoch in between
    assert [table(3, place) for place in range(10)] == PINNED
    assert scattered(7, 3, 10, 0, np.arange(10)).tolist() == COMPUTED
    assert [computed(3, place) for place in range(10)] == COMPUTED
    assert [Shuffle("permutation", None, 10, 0)(3, place) for place in range(10)] == list(range(10))


COMPUTED = [9, 1, 5, 0, 8, 7, 3, 4, 6, 2]


def test_a_table_is_kept_where_it_is_small():
    assert (default_order(TABLE_ITEMS), default_order(TABLE_ITEMS + 1)) == ("permutation", "scattered")
