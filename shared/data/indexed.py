"""Megatron's indexed dataset: a `.bin` of token ids and an `.idx` of document lengths and offsets.

The format of `megatron.core.datasets.indexed_dataset`, version 1, written with numpy: preparing data needs neither Megatron
nor torch. One document is one sequence:

    .idx   b"MMIDIDX\\0\\0" | u64 version | u8 dtype code | u64 sequence count | u64 document index count
           | i32 sequence lengths [tokens] | i64 sequence pointers [bytes] | i64 document indices
    .bin   the token ids of all sequences, concatenated
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

HEADER = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's dtype for this vocabulary (`DType.optimal_dtype`)."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


class IndexedWriter:
    """Writer of `prefix.bin`, document by document, and of `prefix.idx`, on close without an error."""

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.dtype = np.dtype(dtype)
        self._index_path = Path(f"{prefix}.idx")
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._file = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115 -- closed by close()

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return int(sum(int(lengths.sum(dtype=np.int64)) for lengths in self._lengths))

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return int(sum(len(lengths) for lengths in self._lengths))

    def add(self, tokens: npt.NDArray[np.integer], lengths: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Append documents: their concatenated ids, and the length of each in tokens."""
        sizes = np.asarray(lengths, dtype=np.int32)
        assert int(sizes.sum(dtype=np.int64)) == len(tokens), "lengths do not add up to the tokens"
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        self._lengths.append(sizes)

    def close(self) -> None:
        """Write the index. Both files are then complete."""
        self._file.close()
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int32)
        starts = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=starts[1:])
        starts *= self.dtype.itemsize
        with self._index_path.open("wb") as file:
            file.write(HEADER)
            file.write(struct.pack("<QBQQ", VERSION, DTYPE_CODES[self.dtype], len(lengths), len(lengths) + 1))
            for array in (lengths, starts, np.arange(len(lengths) + 1, dtype=np.int64)):
                file.write(array.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
