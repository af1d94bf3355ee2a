"""What a run has written, so that the next one goes on from there after a kill.

A line for every stretch: a file, how many of its bytes are written, and the hash of those. Nothing is taken on trust:
the bytes are read and hashed again before they are kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import xxhash

from shared.checkpoint.copy import blocks
from shared.checkpoint.copy.operations import FilePlan
from shared.checkpoint.files import hash_bytes
from shared.console import log, quantity

JOURNAL = ".journal"
_EVERY = 32 << 20  # bytes between two lines of a file


def plan_key(files: Sequence[FilePlan]) -> str:
    """Which files are to be written, of which sizes, in which blocks."""
    return hash_bytes("\n".join([str(blocks.BLOCK), *(f"{file.name} {file.size}" for file in files)]).encode())


class Journal:
    """The journal of a directory in the making.

    Args:
        directory: the directory.
        work: what decides the bytes of its files; what was written for anything else is removed.
    """

    def __init__(self, directory: Path, work: str) -> None:
        self._path = directory / JOURNAL
        self._resumable = _read(self._path, work)
        self._noted: dict[str, int] = {}
        for path in [path for path in directory.rglob("*") if path.is_file() and path != self._path]:
            if path.relative_to(directory).as_posix() not in self._resumable:
                path.unlink()  # no more is known of it than that it may be half of a file
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if not self._resumable:
            os.ftruncate(self._descriptor, 0)
            self._write({"work": work})

    def resume(self, name: str, descriptor: int, digest: xxhash.xxh3_128) -> int:
        """Bytes at the start of a file that are as they were written; `digest` is brought to their end.

        A file of which nothing can be kept is emptied.
        """
        length, wanted = self._resumable.get(name, (0, ""))
        buffer = memoryview(bytearray(min(blocks.BLOCK, length)))
        done = 0
        while done < length:
            count = os.preadv(descriptor, [buffer[: length - done]], done)
            if count == 0:
                break
            digest.update(buffer[:count])
            done += count
        if length and (done < length or digest.hexdigest() != wanted):
            log(f"{name}: what an earlier run wrote of it is damaged; it is written again")
            length = 0
        if not length:
            digest.reset()
            if os.fstat(descriptor).st_size:  # an empty file that is truncated, ext4 writes out when it is closed
                os.ftruncate(descriptor, 0)
        return length

    def note(self, name: str, length: int, digest: str, last: bool = False) -> None:
        """`length` bytes of a file are written, and this is their hash."""
        if last or length - self._noted.get(name, 0) >= _EVERY:
            self._noted[name] = length
            self._write({"file": name, "bytes": length, "hash": digest})

    def summary(self) -> str:
        """A line that says what is there from an earlier run; empty where there is nothing."""
        size = sum(length for length, _ in self._resumable.values())
        return f"an earlier run was stopped: {quantity(size, 'bytes')} of it are checked and kept" if size else ""

    def close(self, *, remove: bool = False) -> None:
        """Stop writing; with `remove`, the work is done and the journal goes."""
        os.close(self._descriptor)
        if remove:
            self._path.unlink()

    def _write(self, line: dict[str, object]) -> None:
        os.write(self._descriptor, (json.dumps(line) + "\n").encode())


def is_attempt_at(directory: Path, work: str) -> bool:
    """Whether a directory left by another run was to hold the same work."""
    try:
        with (directory / JOURNAL).open(encoding="utf-8") as file:
            return str(json.loads(file.readline())["work"]).startswith(work)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _read(path: Path, work: str) -> dict[str, tuple[int, str]]:
    """The furthest stretch of each file; a last line that a kill cut short is passed over."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except (FileNotFoundError, ValueError):
        return {}
    if not lines or lines[0].get("work") != work:
        return {}
    return {line["file"]: (line["bytes"], line["hash"]) for line in lines[1:]}
