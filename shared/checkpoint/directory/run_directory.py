"""Run directories: a training run publishes iterations one by one into one directory; the newest is the checkpoint."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Self

from shared.checkpoint.directory.manifest import (
    MANIFEST,
    Inputs,
    Kind,
    Manifest,
    Parent,
    origin,
    parents_of,
    read_manifest,
    run_fingerprint,
)
from shared.checkpoint.directory.open import TRACKER, iteration_name
from shared.checkpoint.directory.publish import file_entries
from shared.checkpoint.directory.target import (
    PARTIAL,
    RUN,
    check_overlap,
    check_target,
    clear_leftovers,
    lock,
    recorded_fingerprint,
)
from shared.checkpoint.files import commit_directory, files_below, remove_tree, write_atomically
from shared.console import log
from shared.errors import UserError
from shared.invocation import invocation

HF_FILES = "hf"  # folder of auxiliary files


class RunDirectory:
    """A run directory, locked by this process (rank 0 of a distributed run).

    An iteration is written to `iter_N.partial-<id>`, fsynced and renamed; then `manifest.json` and Megatron's tracker
    file are replaced atomically. The manifest lists the newest iteration and the auxiliary files. Metrics and reports
    change during the run and are not listed.
    """

    def __init__(self, path: Path, *, kind: Kind, fingerprint: str, parents: list[Parent], descriptor: int) -> None:
        self.path = path
        self.iteration: int | None = None
        self._kind = kind
        self._fingerprint = fingerprint
        self._parents = parents
        self._descriptor = descriptor
        self._manifest: Manifest | None = None

    @classmethod
    def open(cls, target: Path, *, kind: Kind, inputs: Inputs, overwrite: bool = False) -> Self:
        """Begin a run, or resume an unfinished run with the same fingerprint (even with `overwrite`).

        Raises:
            AlreadyDone: the run is finished.
            UserError: the target overlaps an input, holds something else, or is locked by another process.
        """
        check_overlap(target, inputs)
        clear_leftovers(target)
        parents = parents_of(inputs)
        fingerprint = run_fingerprint(invocation(), inputs, parents)
        if not _resumable(target, fingerprint):
            check_target(target, fingerprint=fingerprint, overwrite=overwrite)
            if target.exists():
                remove_tree(target)
            target.mkdir(parents=True)
        descriptor = lock(target)
        if descriptor is None:
            raise UserError(f"--target {target}: another process is writing it; wait for it or stop it")
        run = cls(target, kind=kind, fingerprint=fingerprint, parents=parents, descriptor=descriptor)
        run._restore()
        return run

    def _restore(self) -> None:
        """Restore the manifest's state: remove partial and newer iterations, rewrite the tracker."""
        if not (self.path / RUN).exists():
            record = {"identity": self._fingerprint, **origin(invocation())}
            write_atomically(self.path / RUN, (json.dumps(record, indent=1) + "\n").encode())
        self._manifest = read_manifest(self.path, flag="--target")
        self.iteration = self._manifest.iteration if self._manifest else None
        for leftover in sorted(self.path.glob(f"*{PARTIAL}*")):
            remove_tree(leftover)
            log(f"removed {leftover.name}, left by a killed run")
        for folder in self.path.glob("iter_*"):
            if self.iteration is None or int(folder.name.removeprefix("iter_")) > self.iteration:
                remove_tree(folder)  # left by a kill between rename and manifest
        if self.iteration is not None:
            write_atomically(self.path / TRACKER, str(self.iteration).encode())

    def add_auxiliary_files(self, files: Path) -> None:
        """Copy the auxiliary files to `hf/`, on the first call."""
        target = self.path / HF_FILES
        if target.exists():
            return
        partial = self.path / f"{HF_FILES}{PARTIAL}{secrets.token_hex(4)}"
        shutil.copytree(files, partial)
        commit_directory(partial, target)

    def begin(self, iteration: int) -> Path:
        """A new partial directory for an iteration, written by every rank."""
        partial = self.path / f"{iteration_name(iteration)}{PARTIAL}{secrets.token_hex(4)}"
        partial.mkdir()
        self._partial = partial
        return partial

    def commit(self, iteration: int, *, facts: dict[str, Any], finished: bool = False, keep: int = 2) -> None:
        """Publish the iteration of the last `begin`; remove all but the newest `keep` iterations."""
        final = self.path / iteration_name(iteration)
        commit_directory(self._partial, final)
        covered = [*files_below(final), *files_below(self.path / HF_FILES)]
        entries = file_entries(self.path, covered)
        self._record(
            Manifest(
                kind=self._kind,
                state="finished" if finished else "running",
                iteration=iteration,
                identity=self._fingerprint,
                parents=self._parents,
                facts=facts,
                files=entries,
                bytes=sum(entry.size for entry in entries.values()),
                **origin(invocation()),
            )
        )
        for folder in sorted(self.path.glob("iter_*"))[: -max(keep, 1)]:
            remove_tree(folder)

    def finish(self) -> None:
        """Mark the run as finished."""
        assert self._manifest is not None, "a run is finished after its last commit"
        self._record(self._manifest.model_copy(update={"state": "finished"}))

    def _record(self, manifest: Manifest) -> None:
        write_atomically(self.path / MANIFEST, manifest.encode().encode())
        write_atomically(self.path / TRACKER, str(manifest.iteration).encode())
        self._manifest, self.iteration = manifest, manifest.iteration

    def close(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)


def _resumable(target: Path, fingerprint: str) -> bool:
    """Whether the target holds an unfinished run of this fingerprint."""
    if recorded_fingerprint(target) != fingerprint:
        return False
    manifest = read_manifest(target, flag="--target")
    return manifest is None or manifest.state == "running"
