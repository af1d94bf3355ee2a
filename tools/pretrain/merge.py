"""Finished parts of `pretrain prepare` to the files of the dataset: splits, and what deduplication leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shared.cli import log
from shared.data import minhash
from shared.data.deduplication import Groups
from shared.data.indexed import IndexedWriter, token_dtype
from shared.data.parts import FinishedPart, Recipe
from shared.errors import UserError

Deduplicate = Literal["exact", "minhash"]
Parts = dict[str, list[FinishedPart]]  # by the flag they come from: train, validation
DROPPED = "dropped.npy"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Size of a split."""

    tokens: int
    """Tokens, including those that begin and end each document."""
    documents: int
    utf8_bytes: int
    """UTF-8 size of the text, for bits per byte."""


@dataclass(frozen=True, kw_only=True)
class SplitFilter:
    """Selects a split's documents by the hash of their text: equal texts are in the same split."""

    fraction: float
    """Share of validation documents."""
    validation: bool

    def mask(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Mask of the split's documents: `[documents]`."""
        # Upper 53 bits as a number in [0, 1), exact in float64.
        chosen = (hashes >> np.uint64(11)).astype(np.float64) / 2**53 < self.fraction
        return chosen if self.validation else ~chosen


def merge(
    finished: Parts,
    recipe: Recipe,
    fraction: float,
    deduplicate: Deduplicate | None,
    folder: Path,
    record_hash: Callable[[str, str], None],
) -> dict[str, Any]:
    """Write the splits into `folder`. Returns facts for the manifest.

    Args:
        finished: the parts.
        recipe: how they were tokenised.
        fraction: share of validation documents.
        deduplicate: whether and how repeated documents are left out.
        folder: where to write.
        record_hash: told of the name and hash of each large file.

    Raises:
        UserError: a split has no document.
    """
    facts: dict[str, Any] = {}
    kept = _Kept(finished)
    if deduplicate is not None:
        facts["deduplication"] = kept.deduplicate(deduplicate, folder)
    separate = "validation" in finished
    splits: dict[str, Split] = {}
    hashes: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
    if fraction or separate:
        selection = SplitFilter(fraction=1.0 if separate else fraction, validation=True)
        name = "validation" if separate else "train"
        splits["validation"] = _write(
            finished[name], kept.masks(name), selection, recipe, folder / "validation", record_hash
        )
        if not splits["validation"].documents:
            given = "--validation has" if separate else f"--validation-fraction {fraction} leaves"
            raise UserError(f"{given} no document for validation; give more text or a larger share")
        if separate:  # with a share, equal texts are in one split
            hashes = np.concatenate(
                [part.documents()["hash"][mask] for part, mask in zip(finished[name], kept.masks(name), strict=True)]
            )
    selection = SplitFilter(fraction=0.0 if separate else fraction, validation=False)
    splits["train"] = _write(finished["train"], kept.masks("train"), selection, recipe, folder / "train", record_hash)
    if not splits["train"].documents:
        raise UserError("--source has no text for training: every document is empty or went to validation")
    facts["splits"] = splits
    facts["validation_documents_in_train"] = _shared(hashes, finished["train"], kept)
    return facts


class _Kept:
    """Which documents of the parts are kept. Validation comes first: a training document that repeats one is dropped."""

    def __init__(self, finished: Parts) -> None:
        self._finished = finished
        self._order = [name for name in ("validation", "train") if name in finished]
        self._dropped: npt.NDArray[np.bool_] | None = None

    def deduplicate(self, method: Deduplicate, folder: Path) -> dict[str, Any]:
        """Drop the documents that repeat earlier ones. Returns facts; `dropped.npy` has each with the one that is kept."""
        parts = [part for name in self._order for part in self._finished[name]]
        counts = {name: sum(len(part.documents()) for part in self._finished[name]) for name in self._order}
        groups = Groups(sum(counts.values()))
        if method == "exact":
            groups.join(lambda: ((rows["hash"], rows["second"]) for rows in (part.documents() for part in parts)))
        else:
            for band in range(minhash.BANDS):
                groups.join(
                    lambda at=band: ((keys, keys) for keys in (part.signatures()[:, at] for part in parts))  # type: ignore[misc]
                )
        first = groups.first()
        self._dropped = first != np.arange(len(first))
        (places,) = np.nonzero(self._dropped)
        np.save(folder / DROPPED, np.stack([places, first[places]], axis=1))
        dropped, start = {}, 0
        for name, count in counts.items():
            dropped[name] = int(self._dropped[start : start + count].sum())
            start += count
        log(f"{method} deduplication: {sum(dropped.values())} of {len(first)} documents repeat earlier ones")
        settings = minhash.description() if method == "minhash" else {"hash": "128 bits of xxh3_64 with two seeds"}
        return {"method": method, **settings, "documents": counts, "dropped": dropped, "ids": DROPPED}

    def masks(self, name: str) -> Iterator[npt.NDArray[np.bool_]]:
        """Of each part, the documents that are kept."""
        start = 0
        for other in self._order:
            for part in self._finished[other]:
                count = len(part.documents())
                if other == name:
                    yield ~self._dropped[start : start + count] if self._dropped is not None else np.ones(count, bool)
                start += count


def _write(
    parts: list[FinishedPart],
    masks: Iterator[npt.NDArray[np.bool_]],
    selection: SplitFilter,
    recipe: Recipe,
    prefix: Path,
    record_hash: Callable[[str, str], None],
) -> Split:
    dtype = token_dtype(recipe.vocab_size)
    utf8_bytes = 0
    with IndexedWriter(prefix, dtype) as writer:
        for part, kept in zip(parts, masks, strict=True):
            documents = part.documents()
            mask = selection.mask(documents["hash"]) & kept
            if mask.any():
                tokens, lengths = part.tokens(dtype), documents["tokens"]
                writer.add(tokens if mask.all() else tokens[np.repeat(mask, lengths)], lengths[mask])
            utf8_bytes += int(documents["bytes"][mask].sum())
    record_hash(f"{prefix.name}.bin", writer.content_hash)
    return Split(tokens=writer.tokens, documents=writer.documents, utf8_bytes=utf8_bytes)


def _shared(hashes: npt.NDArray[np.uint64], parts: list[FinishedPart], kept: _Kept) -> int:
    """Number of validation documents whose exact text is also in train."""
    if not len(hashes):
        return 0
    found = np.zeros(len(hashes), bool)
    for part, mask in zip(parts, kept.masks("train"), strict=True):
        found |= np.isin(hashes, part.documents()["hash"][mask])
    if duplicates := int(found.sum()):
        log(f"{duplicates} of {len(hashes)} validation documents are in the training text word for word")
    return duplicates
