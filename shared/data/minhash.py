"""MinHash signatures of documents, by rensa: near-duplicates are documents that share a band of their signature.

Shingles are five consecutive words, lower-cased; a word is a run of letters and digits, or one character of a script that
writes no spaces. 128 hashes in 16 bands of 8: two documents with similarity (Jaccard, of their sets of shingles) s share a band
with probability 1 - (1 - s^8)^16, one half at s = 0.67 (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4).
"""

from __future__ import annotations

import re
from array import array
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

SIGNATURE = np.dtype(np.uint64)
SHINGLE_WORDS, HASHES, BANDS, SEED = 5, 128, 16, 42
_NO_SPACES = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # Thai, Lao, Japanese, Chinese
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")


class Signatures:
    """The bands of documents that are handed over in stretches."""

    bands = BANDS

    def __init__(self) -> None:
        from rensa import RMinHash

        self._new = RMinHash
        self._bands = array("Q")
        self._open: Any = None
        self._words: list[str] = []  # the last words of the stretch before
        self._shingled = False

    def update(self, text: str) -> None:
        """The next stretch of the document."""
        if self._open is None:
            self._open, self._words, self._shingled = self._new(num_perm=HASHES, seed=SEED), [], False
        words = self._words + _WORD.findall(text.lower())
        if found := shingles(words):
            self._open.update(found)
            self._shingled = True
        self._words = words[-(SHINGLE_WORDS - 1) :]

    def close(self) -> None:
        """The document ends."""
        if not self._shingled:  # fewer words than a shingle has: all of them, or none
            self._open.update([" ".join(self._words)])
        digest = np.array(self._open.digest(), np.uint32).reshape(BANDS, -1)
        self._bands.extend(xxhash.xxh3_64_intdigest(band.tobytes()) for band in digest)
        self._open = None

    def array(self) -> npt.NDArray[np.uint64]:
        """A hash of each band: `[documents, bands]`."""
        return np.array(self._bands, SIGNATURE).reshape(-1, BANDS)


def shingles(words: list[str]) -> list[str]:
    """Every run of five words."""
    return [" ".join(words[at : at + SHINGLE_WORDS]) for at in range(len(words) - SHINGLE_WORDS + 1)]


def description() -> dict[str, Any]:
    """What the signatures are, for the manifest."""
    import importlib.metadata

    return {
        "library": f"rensa {importlib.metadata.version('rensa')}",
        "shingle_words": SHINGLE_WORDS,
        "hashes": HASHES,
        "bands": BANDS,
        "seed": SEED,
    }
