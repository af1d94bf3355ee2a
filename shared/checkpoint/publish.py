"""Publish a directory whole or not at all.

Everything is written to `TARGET.partial-<id>`, made durable, recorded in `manifest.json` and renamed into place. A
kill at any point leaves the old state or the new, and at most a partial directory that no reader accepts and that the
next run removes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.checkpoint.files import exchange, files_below, hash_files, remove_tree, sync, sync_tree
from shared.checkpoint.manifest import MANIFEST, FileEntry, Inputs, Kind, Manifest, identity, origin, parents_of
from shared.checkpoint.target import PARTIAL, REPLACED, check_overlap, check_target, clear_leftovers, lock
from shared.errors import StageError
from shared.invocation import invocation


class Publication:
    """A directory in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self._hashes: dict[str, str] = {}

    def describe(self, **facts: Any) -> None:
        """Say something of the output for its manifest: JSON values."""
        self.facts.update(facts)

    def record_hash(self, name: str, digest: str) -> None:
        """Hand in the hash of a file, computed while it was written, so that it is not read again."""
        self._hashes[name] = digest

    def entries(self) -> dict[str, FileEntry]:
        """Size and hash of every file written."""
        return list_files(self.path, list(files_below(self.path)), self._hashes)


def list_files(root: Path, paths: list[Path], known: dict[str, str] | None = None) -> dict[str, FileEntry]:
    """Manifest entries of files below `root`; hashes in `known` (by relative path) are not computed again."""
    known = known or {}
    names = [path.relative_to(root).as_posix() for path in paths]
    fresh = [(name, path) for name, path in zip(names, paths, strict=True) if name not in known]
    hashes = known | dict(zip([name for name, _ in fresh], hash_files([path for _, path in fresh]), strict=True))
    unwritten = set(known) - set(names)
    if unwritten:
        raise StageError(f"a hash was recorded for {min(unwritten)}, which was not written")
    return {n: FileEntry(size=p.stat().st_size, hash=hashes[n]) for n, p in zip(names, paths, strict=True)}


@contextlib.contextmanager
def publish(target: Path, *, kind: Kind, inputs: Inputs, overwrite: bool = False) -> Iterator[Publication]:
    """Write a directory inside the block; it appears at `target` when the block ends well.

    Args:
        target: where the directory is to appear.
        kind: what it is.
        inputs: flag -> path(s) that the command reads; they decide, with the options, whether the work is done already.
        overwrite: replace what another Baton command published there.

    Raises:
        AlreadyDone: the same command on the same inputs has published it.
        UserError: the target overlaps an input, or holds something else.
    """
    check_overlap(target, inputs)
    clear_leftovers(target)
    parents = parents_of(inputs)
    same = identity(invocation(), inputs, parents)
    check_target(target, same=same, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}{PARTIAL}{secrets.token_hex(4)}")
    partial.mkdir()
    held = lock(partial)
    try:
        out = Publication(partial)
        yield out
        entries = out.entries()
        manifest = Manifest(
            kind=kind,
            identity=same,
            parents=parents,
            facts=out.facts,
            files=entries,
            bytes=sum(entry.size for entry in entries.values()),
            **origin(invocation()),
        )
        sync_tree(partial)
        (partial / MANIFEST).write_text(manifest.encode(), encoding="utf-8")
        sync(partial / MANIFEST)
        sync(partial)
        _put_in_place(partial, target)
    except BaseException:
        remove_tree(partial)
        raise
    finally:
        if held is not None:
            os.close(held)


def _put_in_place(partial: Path, target: Path) -> None:
    occupied = target.is_dir() and any(target.iterdir())
    if not occupied:
        partial.rename(target)  # also over an empty directory
    elif exchange(partial, target):
        remove_tree(partial)  # the old directory, now under the partial name
    else:
        aside = target.with_name(f"{target.name}{REPLACED}{secrets.token_hex(4)}")
        target.rename(aside)
        partial.rename(target)
        remove_tree(aside)
    sync(target.parent)
