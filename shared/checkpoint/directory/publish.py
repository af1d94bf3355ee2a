"""Publish a directory whole or not at all.

Everything is written to `TARGET.partial-<id>`, made durable, recorded in `manifest.json` and renamed into place. A
kill at any point leaves the old state or the new, and at most a partial directory that no reader accepts and that the
next run removes, or goes on with where the work notes what it wrote.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.checkpoint.copy.journal import JOURNAL, Journal, plan_key
from shared.checkpoint.copy.operations import FilePlan
from shared.checkpoint.copy.worker_pool import Advance, Task, write_files
from shared.checkpoint.directory.manifest import (
    MANIFEST,
    FileEntry,
    Inputs,
    Kind,
    Manifest,
    Parent,
    origin,
    parents_of,
    run_fingerprint,
)
from shared.checkpoint.directory.target import (
    PARTIAL,
    REPLACED,
    check_no_shards,
    check_overlap,
    check_target,
    clear_leftovers,
    lock,
)
from shared.checkpoint.files import exchange, files_below, hash_files, remove_tree, sync, sync_tree
from shared.console import log
from shared.errors import StageError
from shared.invocation import invocation

Checks = Callable[[frozenset[Path]], Sequence[Task]]  # of the files that are read


class Publication:
    """A directory in the making.

    Args:
        path: where to write.
        work: what decides its content.
    """

    writes_auxiliary_files = True  # whether what is not made of moves is to be written here, too

    def __init__(self, path: Path, work: str) -> None:
        self.path = path
        self.work = work
        self.facts: dict[str, Any] = {}
        self._hashes: dict[str, str] = {}

    def describe(self, **facts: Any) -> None:
        """Say something of the output for its manifest: JSON values."""
        self.facts.update(facts)

    def record_hash(self, name: str, digest: str) -> None:
        """Hand in the hash of a file, computed while it was written, so that it is not read again."""
        self._hashes[name] = digest

    def own_files(self, files: Sequence[FilePlan]) -> list[FilePlan]:
        """Those of the directory's files that this process writes."""
        return list(files)

    def write(
        self,
        files: Sequence[FilePlan],
        *,
        workers: int,
        advance: Advance,
        checks: Checks = lambda sources: (),
    ) -> None:
        """Write files that are made of moves; what an earlier run of the same work wrote of them is kept.

        Args:
            files: all such files of the directory.
            workers: threads.
            advance: told of bytes.
            checks: given the files that are read here, what is to be checked meanwhile; an error publishes nothing.
        """
        own_files = self.own_files(files)
        journal = Journal(self.path, f"{self.work} {plan_key(files)}")
        if kept := journal.summary():
            log(kept)
        try:
            for folder in {(self.path / file.name).parent for file in own_files}:
                folder.mkdir(parents=True, exist_ok=True)
            tasks = checks(frozenset().union(*(file.sources for file in own_files)))
            hashes = write_files(self.path, own_files, workers=workers, advance=advance, journal=journal, tasks=tasks)
        finally:
            journal.close()
        for name, digest in hashes.items():
            self.record_hash(name, digest)

    def entries(self) -> dict[str, FileEntry]:
        """Size and hash of every file written."""
        paths = [path for path in files_below(self.path) if path != self.path / JOURNAL]
        return file_entries(self.path, paths, self._hashes)

    def finalize(self, kind: Kind, fingerprint: str, parents: list[Parent]) -> None:
        """Make the directory durable; the manifest last."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        entries = self.entries()
        manifest = Manifest(
            kind=kind,
            identity=fingerprint,
            parents=parents,
            facts=self.facts,
            files=entries,
            bytes=sum(entry.size for entry in entries.values()),
            **origin(invocation()),
        )
        sync_tree(self.path)
        (self.path / MANIFEST).write_text(manifest.encode(), encoding="utf-8")
        sync(self.path / MANIFEST)
        sync(self.path)


def file_entries(root: Path, paths: list[Path], known: dict[str, str] | None = None) -> dict[str, FileEntry]:
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
def publish(
    target: Path, *, kind: Kind, inputs: Inputs, overwrite: bool = False, resumable: bool = False
) -> Iterator[Publication]:
    """Write a directory inside the block; it appears at `target` when the block ends well.

    Args:
        target: where the directory is to appear.
        kind: what it is.
        inputs: flag -> path(s) that the command reads; they decide, with the options, whether the work is done already.
        overwrite: replace what another Baton command published there.
        resumable: all that is large is written by `Publication.write`; a run that was killed or told to stop leaves
            it, and the next run of the same work goes on with it.

    Raises:
        AlreadyDone: the same command on the same inputs has published it.
        UserError: the target overlaps an input, or holds something else.
    """
    check_overlap(target, inputs)
    parents = parents_of(inputs)
    fingerprint = run_fingerprint(invocation(), inputs, parents)
    check_no_shards(target)
    partial, lock_descriptor = clear_leftovers(target, resume=fingerprint if resumable else None)
    try:
        check_target(target, fingerprint=fingerprint, overwrite=overwrite)
        if partial is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}{PARTIAL}{secrets.token_hex(4)}")
            partial.mkdir()
            lock_descriptor = lock(partial)
        out = Publication(partial, f"{fingerprint} {invocation().version}")
        yield out
        out.finalize(kind, fingerprint, parents)
        move_into_place(partial, target)
    except (SystemExit, KeyboardInterrupt):
        if partial is not None and not resumable:
            remove_tree(partial)
        raise
    except BaseException:
        if partial is not None:
            remove_tree(partial)
        raise
    finally:
        if lock_descriptor is not None:
            os.close(lock_descriptor)


def move_into_place(partial: Path, target: Path) -> None:
    """Let a whole directory appear at the target."""
    occupied = target.is_dir() and any(target.iterdir())
    if not occupied:
        partial.rename(target)  # also over an empty directory
    elif exchange(partial, target):
        remove_tree(partial)  # the old directory, now under the partial name
    else:
        replaced = target.with_name(f"{target.name}{REPLACED}{secrets.token_hex(4)}")
        target.rename(replaced)
        partial.rename(target)
        remove_tree(replaced)
    sync(target.parent)
