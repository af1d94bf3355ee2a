"""Datasets of the loop: samples by their position in an endless stream.

Two formats: documents in Megatron's indexed format, cut into sequences (pretraining), and conversations packed into
rows (fine-tuning). Both are memory-mapped; every rank reads its own samples, without communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from shared.data.labels import IGNORE
from shared.errors import UserError
from shared.training.samplers import Indices, permutation

_DOCUMENTS, _SEQUENCES = 1, 2  # independent shuffles of one epoch


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro batch, `[batch, sequence]` each."""

    tokens: torch.Tensor  # int64
    labels: torch.Tensor  # int64: the next token, or IGNORE (no loss)
    segments: torch.Tensor | None = None  # int64; attention only within equal values; None: one segment per row

    def to(self, device: torch.device) -> Batch:
        """The batch on a device. From pinned memory the copy does not block."""
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            segments=self.segments.to(device, non_blocking=True) if self.segments is not None else None,
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

    Memory: four int64 per document (length, start, order, end) and one per sample.
    """

    def __init__(self, prefix: Path, sequence_length: int, *, seed: int | None) -> None:
        stored = IndexedDataset(str(prefix), mmap=True)
        self._lengths = np.asarray(stored.index.sequence_lengths, dtype=np.int64)
        self._tokens = np.memmap(f"{prefix}.bin", dtype=stored.index.dtype, mode="r")
        self._starts = np.asarray(stored.index.sequence_pointers, dtype=np.int64) // self._tokens.dtype.itemsize
        self._seed = seed
        self._epoch = -1
        self.sequence_length = sequence_length
        predicted = int(self._lengths.sum()) - 1
        self._length = -(-predicted // sequence_length) if seed is None else predicted // sequence_length
        if self._length < 1:
            raise UserError(
                f"{prefix}.bin holds {predicted + 1} tokens, fewer than one sequence; "
                f"give a --sequence-length below {predicted + 1} or more data"
            )

    def __len__(self) -> int:
        return self._length

    def batch(self, positions: Indices) -> Batch:
        samples = np.stack([self._sample(int(position)) for position in positions])
        tokens, labels = samples[:, :-1], samples[:, 1:]
        return Batch(
            tokens=torch.from_numpy(np.maximum(tokens, 0)),  # padding: any token id; its label is IGNORE
            labels=torch.from_numpy(np.ascontiguousarray(labels)),
        )

    def _sample(self, position: int) -> npt.NDArray[np.int64]:
        """Tokens of one sample, int64 `[sequence_length + 1]`, IGNORE past the end of the stream."""
        epoch, offset = divmod(position, self._length)
        self._enter(epoch)
        if self._seed is not None:
            offset = int(permutation(self._seed, epoch, self._length, _SEQUENCES)[offset])
        sample = np.full(self.sequence_length + 1, IGNORE, dtype=np.int64)
        place = offset * self.sequence_length
        filled = 0
        document = int(np.searchsorted(self._ends, place, side="right"))
        while filled < sample.size and document < len(self._order):
            index = self._order[document]
            skip = place + filled - (self._ends[document] - self._lengths[index])
            take = min(int(self._lengths[index] - skip), sample.size - filled)
            start = self._starts[index] + skip
            sample[filled : filled + take] = self._tokens[start : start + take]
            filled += take
            document += 1
        return sample

    def _enter(self, epoch: int) -> None:
        """Set `_order`, the documents of an epoch, and `_ends`, the stream position of each document's end."""
        if epoch == self._epoch:
            return
        documents = len(self._lengths)
        self._order = (
            np.arange(documents) if self._seed is None else permutation(self._seed, epoch, documents, _DOCUMENTS)
        )
        self._ends = np.cumsum(self._lengths[self._order])
        self._epoch = epoch


class PackedSequences:
    """Rows of packed conversations: `<split>.{tokens,labels,segments}.npy`, int32 `[rows, sequence_length]`."""

    def __init__(self, directory: Path, split: str, *, seed: int | None) -> None:
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
        self._seed = seed
        self.sequence_length = int(self._tokens.shape[1])

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(self, positions: Indices) -> Batch:
        rows = np.array([self._row(int(position)) for position in positions])
        return Batch(
            tokens=_int64(self._tokens[rows]),
            labels=_int64(self._labels[rows]),
            segments=_int64(self._segments[rows]),
        )

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self))
        return offset if self._seed is None else int(permutation(self._seed, epoch, len(self), _SEQUENCES)[offset])


def _int64(array: npt.NDArray[np.int32]) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
