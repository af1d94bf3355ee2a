"""Publish a directory atomically: write to `TARGET.partial-<id>`, fsync, write `manifest.json` last, rename.

A kill at any point leaves the old target or the new one, and at most a partial directory. Readers refuse a partial
directory. The next run resumes it if its journal has the same work key, and removes it otherwise.
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
    written_version,
)
from shared.checkpoint.directory.target import (
    PARTIAL,
    REPLACED,
    check_no_shards,
    check_overlap,
    check_target,
    clear_leftovers,
    hold,
    lock,
)
from shared.checkpoint.files import exchange, files_below, hash_files, remove_tree, sync, sync_tree
from shared.console import log
from shared.errors import StageError
from shared.invocation import invocation

Checks = Callable[[frozenset[Path]], Sequence[Task]]  # source files -> hash checks to run during the copy


class Publication:
    """An unpublished directory.

    Args:
        path: where to write.
        work: work key: the run's fingerprint and the tool's version.
    """

    writes_auxiliary_files = True  # whether this process writes the files without a FilePlan

    def __init__(self, path: Path, work: str) -> None:
        self.path = path
        self.work = work
        self.facts: dict[str, Any] = {}
        self._hashes: dict[str, str] = {}

    def describe(self, **facts: Any) -> None:
        """Add facts to the manifest: JSON values."""
        self.facts.update(facts)

    def record_hash(self, name: str, digest: str) -> None:
        """Record a hash computed during writing; the file is not read again."""
        self._hashes[name] = digest

    def own_files(self, files: Sequence[FilePlan]) -> list[FilePlan]:
        """The files this process writes; a shard writes its share."""
        return list(files)

    def write(
        self,
        files: Sequence[FilePlan],
        *,
        workers: int,
        advance: Advance,
        checks: Checks = lambda sources: (),
    ) -> None:
        """Write files from copy operations, or resume an earlier run with the same work key.

        Args:
            files: all file plans of the directory, those of other shards included.
            workers: threads.
            advance: called with the number of bytes written or resumed.
            checks: hash checks of the source files, run during the copy. If one fails, nothing is published.
        """
        own_files = self.own_files(files)
        journal = Journal(self.path, f"{self.work} {plan_key(files)}")
        if line := journal.summary():
            log(line)
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
        """fsync the directory, then write the manifest."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        entries = self.entries()
        manifest = Manifest(
            contract_version=written_version(kind, self.facts),
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
    """Manifest entries of files below `root`. `known`: hashes computed before, by relative path."""
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
    target: Path,
    *,
    kind: Kind,
    inputs: Inputs,
    overwrite: bool = False,
    resumable: bool = False,
    parents: list[Parent] | None = None,
) -> Iterator[Publication]:
    """Context manager of a publication: the target appears when the block ends without an exception.

    Args:
        target: the directory to publish.
        kind: its kind.
        inputs: flag -> input path(s). Part of the run's fingerprint, as the options are.
        overwrite: replace a published or unfinished directory of Baton's.
        resumable: keep the partial directory on a kill, a stop or a StageError; the next run with the same work key resumes it.
            Large files must be written by `Publication.write`.
        parents: of the inputs, where they are known: to find them reads the inputs.

    Raises:
        AlreadyDone: the target holds the result of a run with the same fingerprint.
        UserError: the target overlaps an input, or holds something else.
    """
    check_overlap(target, inputs)
    parents = parents_of(inputs) if parents is None else parents
    fingerprint = run_fingerprint(invocation(), inputs, parents)
    check_no_shards(target)
    partial, lock_descriptor = clear_leftovers(target, resume=fingerprint if resumable else None)
    held = None
    try:
        held = hold(target) if target.is_dir() else None
        check_target(target, fingerprint=fingerprint, parents=parents, overwrite=overwrite)
        if partial is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}{PARTIAL}{secrets.token_hex(4)}")
            partial.mkdir()
            lock_descriptor = lock(partial)
        out = Publication(partial, f"{fingerprint} {invocation().version}")
        yield out
        out.finalize(kind, fingerprint, parents)
        move_into_place(partial, target)
    except (SystemExit, KeyboardInterrupt, StageError):
        if partial is not None and not resumable:
            remove_tree(partial)
        raise
    except BaseException:
        if partial is not None:
            remove_tree(partial)
        raise
    finally:
        for descriptor in (lock_descriptor, held):
            if descriptor is not None:
                os.close(descriptor)


def move_into_place(partial: Path, target: Path) -> None:
    """Rename a complete directory to the target. An old target is exchanged and removed."""
    occupied = target.is_dir() and any(target.iterdir())
    if not occupied:
        partial.rename(target)  # also over an empty directory
    elif exchange(partial, target):
        remove_tree(partial)  # now the old directory
    else:
        replaced = target.with_name(f"{target.name}{REPLACED}{secrets.token_hex(4)}")
        target.rename(replaced)
        partial.rename(target)
        remove_tree(replaced)
    sync(target.parent)
