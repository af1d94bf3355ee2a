"""The documents of an epoch: each once, and any place of the stream is found."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from shared.data.indexed import IndexedReader, IndexedWriter
from shared.training.document_order import BLOCK, RUN, Permuted, Scattered, Stored

DOCUMENTS = 3 * BLOCK * RUN + 7 * RUN + 3  # no whole number of blocks or of runs


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> IndexedReader:
    """Documents of 0 to 4 tokens."""
    prefix: Path = tmp_path_factory.mktemp("data") / "train"
    lengths = np.random.default_rng(0).integers(0, 5, DOCUMENTS).astype(np.int32)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.arange(lengths.sum()) % 60000, lengths)
    return IndexedReader(prefix, flag="--data")


def stream(documents, place: int = 0) -> np.ndarray:
    """Places in the .bin, in the order of the epoch."""
    return np.concatenate([np.arange(start, start + length) for start, length in documents.spans(place)])


ORDERS = {
    "stored": Stored,
    "permuted": lambda stored, seed=1, epoch=0: Permuted(stored, seed, epoch),
    "scattered": lambda stored, seed=1, epoch=0: Scattered(stored, seed, epoch),
}


@pytest.mark.parametrize("order", ORDERS)
def test_every_token_comes_once_and_documents_stay_whole(stored, order):
    whole = stream(ORDERS[order](stored))
    assert np.array_equal(np.sort(whole), np.arange(stored.tokens))
    begins = {int(pointer) // 2 for pointer in stored.pointers}
    breaks = whole[1:][whole[1:] != whole[:-1] + 1]
    assert set(breaks.tolist()) <= begins


@pytest.mark.parametrize("order", ORDERS)
def test_any_place_is_found(stored, order):
    documents = ORDERS[order](stored)
    whole = stream(documents)
    for place in (0, 1, 2, 1000, stored.tokens // 2, stored.tokens - 1):
        assert np.array_equal(stream(documents, place), whole[place:])


@pytest.mark.parametrize("order", ["permuted", "scattered"])
def test_epochs_and_seeds_differ(stored, order):
    first = stream(ORDERS[order](stored))
    assert np.array_equal(first, stream(ORDERS[order](stored)))
    assert not np.array_equal(first, stream(ORDERS[order](stored, epoch=1)))
    assert not np.array_equal(first, stream(ORDERS[order](stored, seed=2)))


def test_scattered_neighbours_come_from_everywhere(stored):
    """Of two documents one after another, few are stored within two runs of each other."""
    firsts = stream(ORDERS["scattered"](stored)) // (2 * RUN * 2)
    changes = np.abs(np.diff(firsts))
    assert (changes[changes > 0] > 1).mean() > 0.9


def test_a_computed_order_has_no_table():
    """A million documents leave 8 KiB and small objects; a table has 16 MB."""

    class Million:
        documents = 1 << 20
        lengths = np.broadcast_to(np.int32(500), (1 << 20,))

    tracemalloc.start()
    try:
        documents = Scattered(Million(), 1, 0)
        left, _ = tracemalloc.get_traced_memory()
        assert documents._ends[-1] == 500 << 20
        assert left < 1 << 17
    finally:
        tracemalloc.stop()
