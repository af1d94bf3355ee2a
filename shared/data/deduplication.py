"""Which documents repeat earlier ones: those that share a key with another are one group, and its first document is kept.

Groups are connected: if b is like a and c is like b, all three are one group, as in datatrove's MinHash clusters. A key is the
hash of a text (128 bits), or a band of a MinHash signature. Memory: 13 bytes a document, and the keys of `RANGE` documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

RANGE = 1 << 22  # keys sorted at a time; of more documents the keys are read in several passes, by their value

Keys = Callable[[], Iterable[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]]
"""The keys of all documents in order, part by part: two arrays `[documents]`, equal where both are."""


class Groups:
    """Groups of documents, joined key by key."""

    def __init__(self, documents: int) -> None:
        self._above = np.arange(documents, dtype=np.int64)  # an earlier document of the group; itself for the first

    def join(self, keys: Keys) -> None:
        """Join the documents that have the same key."""
        count = len(self._above)
        passes = max(1, -(-count // RANGE))
        for index in range(passes):
            found = [self._in_range(part, index, passes) for part in _numbered(keys)]
            first, second, document = (np.concatenate([part[place] for part in found]) for place in range(3))
            order = np.lexsort((document, second, first))
            first, second, document = first[order], second[order], document[order]
            same = (first[1:] == first[:-1]) & (second[1:] == second[:-1])
            for earlier, later in zip(document[:-1][same].tolist(), document[1:][same].tolist(), strict=True):
                self._unite(earlier, later)

    def first(self) -> npt.NDArray[np.int64]:
        """Of each document the first of its group: itself, if it is kept."""
        above = self._above
        while not np.array_equal(above, higher := above[above]):
            above = higher
        return above

    def _unite(self, one: int, other: int) -> None:
        one, other = self._root(one), self._root(other)
        self._above[max(one, other)] = min(one, other)

    def _root(self, document: int) -> int:
        above = self._above
        while (higher := int(above[document])) != document:
            above[document] = above[higher]
            document = higher
        return document

    @staticmethod
    def _in_range(
        part: tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.int64]], index: int, passes: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        if passes == 1:
            return part
        chosen = part[0] % np.uint64(passes) == index
        return part[0][chosen], part[1][chosen], part[2][chosen]


def _numbered(
    keys: Keys,
) -> Iterable[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
    start = 0
    for first, second in keys():
        yield first, second, np.arange(start, start + len(first), dtype=np.int64)
        start += len(first)
