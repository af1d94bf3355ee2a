"""Order of the documents of an epoch: a stream of tokens, of which any place is found.

`spans(place)` gives the documents from a place of the stream on, as (first id in the .bin, number of ids); the first of them is
what is left of the document there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from shared.data.indexed import IndexedReader
from shared.training.samplers import Indices, Order, permutation, scattered

RUN = 16  # documents that are stored one after another and are moved together
BLOCK = 64  # runs that are shuffled together, 1024 documents
_CHUNK = BLOCK << 10  # runs looked at at a time when an epoch begins
_DOCUMENTS = 1  # stream of the shuffle


class Documents(Protocol):
    """The documents of an epoch, in its order."""

    def spans(self, place: int) -> Iterator[tuple[int, int]]:
        """See the module."""


class Stored:
    """As stored: read from the index, without memory of its own."""

    def __init__(self, stored: IndexedReader) -> None:
        self._stored, self._width = stored, stored.dtype.itemsize

    def spans(self, place: int) -> Iterator[tuple[int, int]]:
        pointers, lengths = self._stored.pointers, self._stored.lengths
        first = bisect_right(pointers, place * self._width) - 1
        skip = place - int(pointers[first]) // self._width
        for document in range(first, self._stored.documents):
            yield int(pointers[document]) // self._width + skip, int(lengths[document]) - skip
            skip = 0


class Permuted:
    """In the order of a table: 16 bytes per document."""

    def __init__(self, stored: IndexedReader, seed: int, epoch: int) -> None:
        self._stored = stored
        self._order = permutation(seed, epoch, stored.documents, _DOCUMENTS)
        self._ends = np.cumsum(stored.lengths[self._order], dtype=np.int64)

    def spans(self, place: int) -> Iterator[tuple[int, int]]:
        first = int(np.searchsorted(self._ends, place, side="right"))
        yield from _spans(self._stored, self._order[first:], self._ends[first:], place)


class Scattered:
    """In a computed order: 8 bytes per block of 1024 documents.

    Runs of 16 documents are scattered over the epoch; the 64 runs that come to lie in a block are shuffled, document by
    document. An epoch begins with a pass over the lengths of all documents.
    """

    def __init__(self, stored: IndexedReader, seed: int, epoch: int) -> None:
        self._stored, self._seed, self._epoch = stored, seed, epoch
        self._runs = -(-stored.documents // RUN)
        totals = []
        for first in range(0, self._runs, _CHUNK):
            documents = self._scattered(first, first + _CHUNK)
            present = documents < stored.documents
            lengths = np.where(present, stored.lengths[np.where(present, documents, 0)], 0)
            totals.append(np.add.reduceat(lengths.sum(1, dtype=np.int64), np.arange(0, len(lengths), BLOCK)))
        self._ends = np.cumsum(np.concatenate(totals))  # of each block

    def spans(self, place: int) -> Iterator[tuple[int, int]]:
        for block in range(int(np.searchsorted(self._ends, place, side="right")), len(self._ends)):
            order = self._block(block)
            begins = int(self._ends[block - 1]) if block else 0
            ends = begins + np.cumsum(self._stored.lengths[order], dtype=np.int64)
            first = int(np.searchsorted(ends, place, side="right"))
            yield from _spans(self._stored, order[first:], ends[first:], place)
            place = int(ends[-1])

    def _block(self, block: int) -> Indices:
        """The documents of a block, in order."""
        documents = self._scattered(block * BLOCK, (block + 1) * BLOCK).flatten()
        documents = documents[documents < self._stored.documents]
        key = np.random.SeedSequence([self._seed, self._epoch, _DOCUMENTS, block])
        return np.random.Generator(np.random.Philox(key)).permutation(documents)

    def _scattered(self, first: int, last: int) -> Indices:
        """The documents of runs `first` to `last`, `[runs, 16]`; beyond the last document in the last run."""
        places = np.arange(first, min(last, self._runs))
        return scattered(self._seed, self._epoch, self._runs, _DOCUMENTS, places)[:, None] * RUN + np.arange(RUN)


def documents_of(stored: IndexedReader, order: Order, seed: int | None, epoch: int) -> Documents:
    """The documents of an epoch; `seed` None: as stored."""
    if seed is None:
        return Stored(stored)
    return Permuted(stored, seed, epoch) if order == "permutation" else Scattered(stored, seed, epoch)


def _spans(stored: IndexedReader, order: Indices, ends: Indices, place: int) -> Iterator[tuple[int, int]]:
    """Documents `order`, which end at places `ends` of the stream, the first from `place` on."""
    for document, end in zip(order, ends, strict=True):
        length = int(end) - place
        start = int(stored.pointers[document]) // stored.dtype.itemsize
        yield start + int(stored.lengths[document]) - length, length
        place = int(end)
