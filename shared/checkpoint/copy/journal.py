"""Journal of an output directory: length and hash of each file's written prefix, for a resume after a kill.

JSON lines: `{"work": key}` first, then `{"file", "bytes", "hash"}` per written prefix. A resume hashes the prefix again and
keeps it only if the hash matches.
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
_EVERY = 32 << 20  # bytes of a file between two entries


def plan_key(files: Sequence[FilePlan]) -> str:
    """Hash of the files' names and sizes and of the block size."""
    return hash_bytes("\n".join([str(blocks.BLOCK), *(f"{file.name} {file.size}" for file in files)]).encode())


class Journal:
    """Journal of an unpublished directory. Files it does not list are removed on opening.

    Args:
        directory: the unpublished directory.
        work: work key: run's fingerprint, tool version and file plans; a journal with another key is discarded.
    """

    def __init__(self, directory: Path, work: str) -> None:
        self._path = directory / JOURNAL
        self._resumable = _read(self._path, work)
        self._noted: dict[str, int] = {}
        for path in [path for path in directory.rglob("*") if path.is_file() and path != self._path]:
            if path.relative_to(directory).as_posix() not in self._resumable:
                path.unlink()  # possibly incomplete
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if not self._resumable:
            os.ftruncate(self._descriptor, 0)
            self._write({"work": work})

    def resume(self, name: str, descriptor: int, digest: xxhash.xxh3_128) -> int:
        """Length of the file's verified prefix; `digest` is updated with it. Truncates the file if nothing is verified."""
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
            log(f"{name}: the part written by an earlier run is damaged; writing it again")
            length = 0
        if not length:
            digest.reset()
            if os.fstat(descriptor).st_size:  # ext4 flushes a truncated file on close, even if it was empty before
                os.ftruncate(descriptor, 0)
        return length

    def note(self, name: str, length: int, digest: str, last: bool = False) -> None:
        """Record a written prefix of `length` bytes and its hash. `last`: the file is complete."""
        if last or length - self._noted.get(name, 0) >= _EVERY:
            self._noted[name] = length
            self._write({"file": name, "bytes": length, "hash": digest})

    def summary(self) -> str:
        """Log line with the number of resumed bytes; empty without any."""
        size = sum(length for length, _ in self._resumable.values())
        return f"resuming: {quantity(size, 'bytes')} written by an earlier run, verified and kept" if size else ""

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, line: dict[str, object]) -> None:
        os.write(self._descriptor, (json.dumps(line) + "\n").encode())


def is_attempt_at(directory: Path, work: str) -> bool:
    """Whether the work key of the directory's journal starts with `work`."""
    try:
        with (directory / JOURNAL).open(encoding="utf-8") as file:
            return str(json.loads(file.readline())["work"]).startswith(work)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _read(path: Path, work: str) -> dict[str, tuple[int, str]]:
    """The longest recorded prefix of each file. An incomplete last line (a kill) is ignored."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except (FileNotFoundError, ValueError):
        return {}
    if not lines or lines[0].get("work") != work:
        return {}
    return {line["file"]: (line["bytes"], line["hash"]) for line in lines[1:]}
