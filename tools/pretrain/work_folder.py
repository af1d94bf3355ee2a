"""`TARGET.work`: the parts that `pretrain prepare` has finished, of one process or of several (`--shard`).

Parts are named by content. A shard does not read the sources of others to find theirs: each finished part is also recorded by
its place in the plan, with the size and the time of its files. So the number of shards may change between runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from shared.checkpoint.files import write_atomically
from shared.cli import log
from shared.data.parts import FinishedPart, Part, Recipe, finished_part, is_finished
from shared.errors import UserError

WORK = ".work"
_PATIENCE = 2.0  # seconds that a shard waits: another one that has failed holds the folder alone while it removes it
_JOINING = "joining"


def open_work(work: Path, *, shard: bool = False) -> int:
    """Create or reopen the folder of parts, and lock it: alone, or as one of several shards. Returns the descriptor."""
    until = time.monotonic() + (_PATIENCE if shard else 0)
    while True:
        work.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process has removed it meanwhile
            held = os.open(work, os.O_RDONLY)
            try:
                fcntl.flock(held, (fcntl.LOCK_SH if shard else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(held)
                if time.monotonic() < until:
                    time.sleep(0.05)
                    continue
                raise UserError(f"--target: another process is preparing into {work}; wait for it or stop it") from None
            if work.exists() and os.path.samestat(work.stat(), os.fstat(held)):
                break
            os.close(held)
    if not shard:
        _drop_unfinished(work)
    return held


def _drop_unfinished(work: Path) -> None:
    """Remove what killed processes were writing; nobody else works in the folder."""
    for left in work.glob("*.new-*"):
        left.unlink()


@contextlib.contextmanager
def joining(work: Path) -> Iterator[bool]:
    """Whether this process is the one that joins the parts; False while another does."""
    with (work / _JOINING).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def drop_if_empty(work: Path, held: int) -> None:
    """Remove the folder if it has no finished parts, and no other shard is about to write its first.

    Args:
        work: the folder of parts.
        held: its descriptor, of `open_work`; its lock is lost.
    """
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another shard works in it
        return
    _drop_unfinished(work)
    if any(work.iterdir()):
        log(f"finished parts are kept in {work} for the next run")
    else:
        work.rmdir()


class Ledger:
    """The finished parts of a plan, of all shards.

    Args:
        work: the folder of parts.
        plan: every part.
        recipe: how they are tokenised.
        run: the fingerprint of the run, so that shards of other commands are not taken for this one's.
    """

    def __init__(self, work: Path, plan: Sequence[Part], recipe: Recipe, run: str) -> None:
        self._work, self._plan = work, plan
        key = xxhash.xxh3_64(recipe.digest + recipe.suffix.encode() + run.encode() + str(len(plan)).encode())
        self._key = key.hexdigest()

    def record(self, index: int, part: FinishedPart) -> None:
        """Part `index` of the plan is finished."""
        content = {"prefix": part.prefix.name, "sources": _state(self._plan[index])}
        write_atomically(self._path(index), json.dumps(content).encode())

    def finished(self) -> list[FinishedPart | None]:
        """Every part of the plan; None where it is not finished, or its sources have changed since."""
        return [self._read(index, part) for index, part in enumerate(self._plan)]

    def _read(self, index: int, part: Part) -> FinishedPart | None:
        try:
            content = json.loads(self._path(index).read_bytes())
        except FileNotFoundError:
            return None
        prefix = self._work / str(content["prefix"])
        if content["sources"] != _state(part) or not is_finished(prefix):
            return None
        return finished_part(part, prefix, reused=False)

    def _path(self, index: int) -> Path:
        return self._work / f"part-{self._key}-{index}.json"


def _state(part: Part) -> list[list[Any]]:
    """Name, bounds, size and time of change of a part's files."""
    found = []
    for piece in part.pieces:
        status = piece.path.stat()
        found.append([piece.path.name, piece.start, piece.end, status.st_size, status.st_mtime_ns])
    return found
