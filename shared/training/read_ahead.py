"""Reading the next update's samples while the current one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace

from shared.training.data import Batch, Dataset
from shared.training.samplers import Indices


class ReadAhead:
    """A dataset whose batches are read one update ahead, by a thread.

    `batch(positions)` returns what the dataset's `batch` returns, whatever was read ahead: the order of samples and a resume do
    not depend on the thread. After it, the batch at `positions + ahead` is read: the same micro batch of the next update.
    Memory: the micro batches of one update.
    """

    def __init__(self, data: Dataset, *, ahead: int, pin: bool) -> None:
        """
        Args:
            data: read by the thread only.
            ahead: samples per update.
            pin: into page-locked memory, from which a copy to a GPU runs beside the computation.
        """
        self.sequence_length = data.sequence_length
        self._data, self._ahead = data, ahead
        self._finish: Callable[[Batch], Batch] = pinned if pin else lambda batch: batch
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._reading: dict[bytes, Future[Batch]] = {}

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, positions: Indices) -> Batch:
        """The samples at `positions`, in that order. Errors of the dataset are raised here."""
        reading = self._reading.pop(positions.tobytes(), None) or self._read(positions)
        following = positions + self._ahead
        self._reading[following.tobytes()] = self._read(following)
        return reading.result()

    def _read(self, positions: Indices) -> Future[Batch]:
        return self._thread.submit(lambda: self._finish(self._data.batch(positions)))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory."""
    parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: part.pin_memory() for name, part in parts.items() if part is not None})
