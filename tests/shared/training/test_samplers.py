"""The sample order: a function of seed and step, independent of the layout."""

import numpy as np

from shared.training.samplers import batch_positions, permutation


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
    permutation.cache_clear()
    assert np.array_equal(first, permutation(1, 0, 1000))
    others = [permutation(2, 0, 1000), permutation(1, 1, 1000), permutation(1, 0, 1000, stream=1)]
    assert not any(np.array_equal(first, other) for other in others)
    assert sorted(first) == list(range(1000))


def test_the_order_is_pinned():
    """Another order after an upgrade of numpy would make a resumed run repeat and skip samples."""
    assert permutation(7, 3, 10).tolist() == PINNED


PINNED = [0, 9, 3, 6, 5, 1, 8, 7, 4, 2]
