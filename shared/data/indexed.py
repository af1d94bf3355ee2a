"""Megatron's indexed dataset: a `.bin` of token ids and an `.idx` of document lengths and offsets.

The format of `megatron.core.datasets.indexed_dataset`, version 1, written and read with numpy: preparing and checking data
needs neither Megatron nor torch. One document is one sequence:

    .idx   b"MMIDIDX\\0\\0" | u64 version | u8 dtype code | u64 sequence count | u64 document index count
           | i32 sequence lengths [tokens] | i64 sequence pointers [bytes] | i64 document indices
    .bin   the token ids of all sequences, concatenated
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from shared.checkpoint.files import write_out
from shared.errors import UserError

HEADER = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
# Of `megatron.core.datasets.indexed_dataset.DType`; the codes of floats, 6 and 7, hold no token ids.
READ_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_HEAD = struct.Struct("<9sQBQQ")
_BLOCK = 1 << 20  # documents of an index written at a time
_WRITTEN = 1 << 20  # bytes of ids written at a time
_SCAN = 1 << 24  # tokens or documents looked at at a time


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's dtype for this vocabulary (`DType.optimal_dtype`)."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


class IndexedWriter:
    """Writer of `prefix.bin`, document by document, and of `prefix.idx`, on close without an error.

    Memory does not grow with the documents: lengths are written at once, what follows from them on close.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.dtype = np.dtype(dtype)
        self.tokens = 0
        """Tokens written so far."""
        self.documents = 0
        """Documents written so far."""
        self._index_path = Path(f"{prefix}.idx")
        self._file = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115 -- closed by close()
        self._digest, self._size = xxhash.xxh3_128(), 0
        self._index = self._index_path.open("w+b")
        self._index.write(bytes(_HEAD.size))

    def add(self, tokens: npt.NDArray[np.integer], lengths: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Append documents: their concatenated ids, and the length of each in tokens."""
        sizes = np.asarray(lengths, dtype=np.int32)
        assert int(sizes.sum(dtype=np.int64)) == len(tokens), "lengths do not add up to the tokens"
        content = np.ascontiguousarray(tokens, dtype=self.dtype).view(np.uint8)
        for first in range(0, len(content), _WRITTEN):
            block = content[first : first + _WRITTEN].data
            self._digest.update(block)  # while it is in the caches: nobody reads the file again for its hash
            self._file.write(block)
            write_out(self._file.fileno(), self._size, len(block))  # fsync then waits less
            self._size += len(block)
        self._index.write(sizes.tobytes())
        self.tokens += len(tokens)
        self.documents += len(sizes)

    @property
    def content_hash(self) -> str:
        """Of the `.bin`, as `files.hash_file` has it."""
        return f"xxh3_128:{self._digest.hexdigest()}"

    def close(self) -> None:
        """Write the index. Both files are then complete."""
        self._file.close()
        with self._index as file:
            start = 0  # bytes before the next document
            for first in range(0, self.documents, _BLOCK):
                file.seek(_HEAD.size + 4 * first)
                lengths = np.frombuffer(file.read(4 * min(_BLOCK, self.documents - first)), np.int32)
                ends = start + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
                file.seek(_HEAD.size + 4 * self.documents + 8 * first)
                file.write(np.concatenate([[start], ends[:-1]]).astype(np.int64).tobytes())
                start = int(ends[-1])
            file.seek(_HEAD.size + 12 * self.documents)
            for first in range(0, self.documents + 1, _BLOCK):
                file.write(np.arange(first, min(first + _BLOCK, self.documents + 1), dtype=np.int64).tobytes())
            file.seek(0)
            code = DTYPE_CODES[self.dtype]
            file.write(_HEAD.pack(HEADER, VERSION, code, self.documents, self.documents + 1))
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
            self._index.close()
            self._index_path.unlink()  # without its header it is no index


class IndexedReader:
    """A pair `prefix.bin` and `prefix.idx`, memory-mapped: opening it reads the header only.

    The arrays of the index lie at odd addresses. Slices, fancy indices and `bisect` read what they touch; `np.searchsorted`
    and arithmetic on a whole array would copy it.

    Raises:
        UserError: a file is missing, truncated or of another format; sequences are not documents; there is no token.
    """

    lengths: npt.NDArray[np.int32]  # [documents], tokens
    pointers: npt.NDArray[np.int64]  # [documents], offset of each document in the .bin, bytes
    ids: npt.NDArray[np.integer]  # [tokens]

    def __init__(self, prefix: Path, *, flag: str) -> None:
        self.prefix = prefix
        self._name = f"{flag} {prefix}"
        index, content = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path, other in ((index, content), (content, index)):
            if not path.is_file():
                raise UserError(f"{flag} {path} is missing; {other.name} is one file of two, give both")
        if index.stat().st_size < _HEAD.size:
            raise UserError(f"{flag} {index} is no Megatron index: it has {index.stat().st_size} bytes")
        mapped = np.memmap(index, mode="r")
        header, version, code, sequences, documents = _HEAD.unpack(mapped[: _HEAD.size].tobytes())
        if header != HEADER or version != VERSION:
            raise UserError(f"{flag} {index} is no Megatron index of version {VERSION} (MMIDIDX)")
        if code not in READ_DTYPES:
            raise UserError(
                f"{flag} {index} has dtype code {code}, which is not of token ids; tokenise the text into an integer type"
            )
        self.dtype = np.dtype(READ_DTYPES[code])
        expected = _HEAD.size + 12 * sequences + 8 * documents
        if sequences and len(mapped) == expected + sequences:
            raise UserError(f"{flag} {index} has modes, of multimodal data; text only is trained on")
        if len(mapped) != expected:
            raise UserError(
                f"{flag} {index} has {len(mapped)} bytes, and its header promises {expected}: truncated or damaged"
            )
        if documents != sequences + 1:
            raise UserError(
                f"{flag} {index} has {sequences} sequences in {documents - 1} documents; preprocess it without "
                "--split-sentences: a document must be one sequence"
            )
        self.lengths = np.frombuffer(mapped, np.int32, sequences, _HEAD.size)
        self.pointers = np.frombuffer(mapped, np.int64, sequences, _HEAD.size + 4 * sequences)
        wanted = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        size = content.stat().st_size
        if size != wanted:
            what = "truncated" if size < wanted else "of another index"
            raise UserError(f"{flag} {content} has {size} bytes, and {index.name} promises {wanted}: it is {what}")
        if not wanted:
            raise UserError(f"{flag} {content} holds no token")
        self.ids = np.memmap(content, dtype=self.dtype, mode="r")

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return len(self.ids)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def check(self, vocab_size: int, *, advance: Callable[[int], None] = lambda count: None) -> None:
        """Read everything once: documents follow one another, and every id is below `vocab_size`.

        `advance` is told of the bytes read.

        Raises:
            UserError: naming the document or the token.
        """
        end = 0
        for first in range(0, self.documents, _SCAN):
            lengths = self.lengths[first : first + _SCAN].astype(np.int64) * self.dtype.itemsize
            ends = np.concatenate([[end], end + np.cumsum(lengths)])
            wrong = (lengths < 0) | (self.pointers[first : first + _SCAN] != ends[:-1])
            if wrong.any():
                raise UserError(
                    f"{self._name}.idx: document {first + int(wrong.argmax())} does not begin where the one before it "
                    "ends; the index is damaged"
                )
            end = int(ends[-1])
        for first in range(0, self.tokens, _SCAN):
            ids = self.ids[first : first + _SCAN]
            if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
                at = int(((ids >= vocab_size) | (ids < 0)).argmax())
                raise UserError(
                    f"{self._name}.bin: token {first + at} is id {ids[at]}, and the tokenizer of --tokenizer has ids below "
                    f"{vocab_size}; give the tokenizer that the text was tokenised with"
                )
            advance(ids.nbytes)
