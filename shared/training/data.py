"""Datasets of the loop: samples by their position in an endless stream.

Two formats: documents in Megatron's indexed format, cut into sequences (pretraining), and conversations packed into
rows (fine-tuning); and a blend of several. All are memory-mapped; every rank reads its own samples, without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from shared.data.indexed import IndexedReader
from shared.data.labels import IGNORE
from shared.errors import UserError
from shared.training.blend import Blend
from shared.training.document_order import Documents, documents_of
from shared.training.samplers import Indices, Order, Shuffle

_SEQUENCES = 2  # stream of the shuffle
_PADDING = 0  # segment of padding in packed rows


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro batch, `[batch, sequence]` each."""

    tokens: torch.Tensor  # int64
    labels: torch.Tensor  # int64: the next token, or IGNORE (no loss)
    segments: torch.Tensor | None = None  # int64; attention only within equal values; None: one segment per row
    padding: torch.Tensor | None = None  # bool; None: no padding

    def to(self, device: torch.device) -> Batch:
        """The batch on a device. From pinned memory the copy does not block."""
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            segments=self.segments.to(device, non_blocking=True) if self.segments is not None else None,
            padding=self.padding.to(device, non_blocking=True) if self.padding is not None else None,
        )


class Dataset(Protocol):
    """Samples by position p in an endless stream: sample `p % len` of epoch `p // len`."""

    sequence_length: int

    def __len__(self) -> int:
        """Samples of one epoch."""

    def batch(self, positions: Indices) -> Batch:
        """The samples at `positions`, in that order."""


class IndexedSequences:
    """Documents of an indexed dataset, concatenated into a stream and split every `sequence_length` tokens.

    A sample has `sequence_length + 1` tokens; its last token is the first of the next sample. So every token but the
    stream's first is a target once per epoch.

    With a seed, documents and samples are shuffled anew in every epoch, and an incomplete last sample is dropped. Without
    a seed (validation), the stored order is kept, and the last sample is padded with IGNORE labels.

    With `document_mask` each document is a segment of its own, and the first token of a document is no target. A document
    that is cut by the end of a sample goes on in the next as a new segment.

    Memory: with order "permutation" 16 bytes per document and 8 per sample; with "scattered" 8 bytes per 1024 documents.
    """

    def __init__(
        self,
        prefix: Path,
        sequence_length: int,
        *,
        seed: int | None,
        order: Order = "permutation",
        document_mask: bool = False,
    ) -> None:
        self._stored = IndexedReader(prefix, flag="--data")
        self._seed, self._order, self._document_mask = seed, order, document_mask
        self._epoch = -1
        self._documents: Documents | None = None
        self.sequence_length = sequence_length
        predicted = self._stored.tokens - 1
        self._length = -(-predicted // sequence_length) if seed is None else predicted // sequence_length
        if self._length < 1:
            raise UserError(
                f"{prefix}.bin holds {predicted + 1} tokens, fewer than one sequence; "
                f"give a --sequence-length below {predicted + 1} or more data"
            )
        self._shuffle = Shuffle(order, seed, self._length, _SEQUENCES)

    def __len__(self) -> int:
        return self._length

    def batch(self, positions: Indices) -> Batch:
        samples, documents = (np.stack(arrays) for arrays in zip(*map(self._sample, positions), strict=True))
        tokens, labels = samples[:, :-1], samples[:, 1:].copy()
        segments = None
        if self._document_mask:
            segments = torch.from_numpy(np.ascontiguousarray(documents[:, :-1]))
            labels[documents[:, 1:] != documents[:, :-1]] = IGNORE
        return Batch(
            tokens=torch.from_numpy(np.maximum(tokens, 0)),  # padding: any token id; its label is IGNORE
            labels=torch.from_numpy(labels),
            segments=segments,
        )

    def _sample(self, position: np.int64) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokens of one sample, int64 `[sequence_length + 1]`, IGNORE past the end; and the document of each, 0 there."""
        epoch, offset = divmod(int(position), self._length)
        offset = self._shuffle(epoch, offset)
        sample = np.full(self.sequence_length + 1, IGNORE, dtype=np.int64)
        documents = np.zeros_like(sample)
        filled = 0
        for document, (start, length) in enumerate(self._of(epoch).spans(offset * self.sequence_length), start=1):
            take = min(length, sample.size - filled)
            sample[filled : filled + take] = self._stored.ids[start : start + take]
            documents[filled : filled + take] = document
            filled += take
            if filled == sample.size:
                break
        return sample, documents

    def _of(self, epoch: int) -> Documents:
        """The documents of an epoch, in its order."""
        if epoch != self._epoch or self._documents is None:
            self._documents = documents_of(self._stored, self._order, self._seed, epoch)
            self._epoch = epoch
        return self._documents


class PackedSequences:
    """Rows of packed conversations: `<split>.{tokens,labels,segments}.npy`, int32 `[rows, sequence_length]`."""

    def __init__(self, directory: Path, split: str, *, seed: int | None, order: Order = "permutation") -> None:
        self._tokens, self._labels, self._segments = (
            np.load(directory / f"{split}.{part}.npy", mmap_mode="r") for part in ("tokens", "labels", "segments")
        )
        if not self._tokens.shape == self._labels.shape == self._segments.shape:
            raise UserError(
                f"{directory}: {split}.tokens.npy {self._tokens.shape}, labels {self._labels.shape} and segments "
                f"{self._segments.shape} differ in shape; prepare the data again"
            )
        if not len(self._tokens):
            raise UserError(f"{directory / split}.tokens.npy has no rows; prepare it from more conversations")
        self._shuffle = Shuffle(order, seed, len(self._tokens), _SEQUENCES)
        self.sequence_length = int(self._tokens.shape[1])

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(self, positions: Indices) -> Batch:
        rows = np.array([self._row(int(position)) for position in positions])
        segments = _int64(self._segments[rows])
        return Batch(
            tokens=_int64(self._tokens[rows]),
            labels=_int64(self._labels[rows]),
            segments=segments,
            padding=segments == _PADDING,
        )

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self))
        return self._shuffle(epoch, offset)


class BlendedSequences:
    """Samples of several sources in the places that a blend gives them."""

    def __init__(self, blend: Blend, sources: Sequence[Dataset]) -> None:
        self._blend, self._sources = blend, sources
        self.sequence_length = sources[0].sequence_length

    def __len__(self) -> int:
        return self._blend.epoch

    def batch(self, positions: Indices) -> Batch:
        parts = []
        for position in positions:
            source, place = self._blend.locate(int(position))
            parts.append(self._sources[source].batch(np.array([place])))
        segments = [part.segments for part in parts if part.segments is not None]
        padding = [part.padding for part in parts if part.padding is not None]
        return Batch(
            tokens=torch.cat([part.tokens for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
            segments=torch.cat(segments) if segments else None,
            padding=torch.cat(padding) if padding else None,
        )


def blended(blend: Blend, sources: Sequence[Dataset]) -> Dataset:
    """The sources as one dataset; a single source itself."""
    return sources[0] if len(sources) == 1 else BlendedSequences(blend, sources)


def _int64(array: npt.NDArray[np.int32]) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
