"""File input and output in blocks of bounded size."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import xxhash

from shared.errors import UserError

BLOCK = 1 << 20  # bytes; fits in a core's cache: larger blocks are read, hashed and written several times slower


class OpenFiles:
    """Cache of open files for positional reads. Thread-safe."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: Path) -> int:
        """The file's descriptor, opened on first use."""
        if path not in self._open:
            with self._lock:
                if path not in self._open:
                    self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]

    def read_into(self, path: Path, start: int, out: memoryview) -> None:
        """Fill `out` with the file's bytes from offset `start`."""
        descriptor, done = self.descriptor(path), 0
        while done < len(out):
            count = os.preadv(descriptor, [out[done:]], start + done)
            if count == 0:
                raise UserError(f"{path} is truncated at byte {start + done}; fetch it again")
            done += count

    def read(self, path: Path, start: int, size: int) -> bytes:
        """`size` bytes from offset `start`."""
        out = bytearray(size)
        self.read_into(path, start, memoryview(out))
        return bytes(out)

    def blocks(self, path: Path, start: int, size: int, unit: int) -> Iterator[memoryview]:
        """A byte range in blocks, multiples of `unit` bytes (a row). A block is valid until the next is requested."""
        step = max(BLOCK // unit, 1) * unit if unit else BLOCK
        buffer = memoryview(bytearray(min(step, size)))
        for position in range(start, start + size, step):
            block = buffer[: min(step, start + size - position)]
            self.read_into(path, position, block)
            yield block

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HashedFile:
    """A new file, hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0  # bytes written so far
        self._file = path.open("xb", buffering=0)
        self._hash = xxhash.xxh3_128()

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view) :]
        self.position += len(data)

    def close(self) -> str:
        """Close the file; returns its content hash, `xxh3_128:<hex>`."""
        self._file.close()
        return f"xxh3_128:{self._hash.hexdigest()}"
