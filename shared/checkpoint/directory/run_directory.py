"""Run directories: a training run publishes iterations one by one into one directory; the newest is the checkpoint."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

from shared.checkpoint.directory.manifest import (
    MANIFEST,
    FileEntry,
    Inputs,
    Kind,
    Manifest,
    Parent,
    compared,
    misfit,
    origin,
    parents_of,
    read_manifest,
    run_fingerprint,
    written_version,
)
from shared.checkpoint.directory.publish import file_entries, move_into_place
from shared.checkpoint.directory.recognition import TRACKER, iteration_name
from shared.checkpoint.directory.target import (
    PARTIAL,
    RUN,
    Difference,
    check_overlap,
    check_target,
    clear_leftovers,
    hold,
    lock,
    recorded_fingerprint,
)
from shared.checkpoint.files import commit_directory, files_below, hash_files, remove_tree, write_atomically
from shared.console import log
from shared.errors import StageError, UserError
from shared.invocation import invocation

HF_FILES = "hf"  # folder of auxiliary files
_WRITER_SECONDS = 10.0


class RunDirectory:
    """A run directory, locked by this process (rank 0 of a distributed run).

    An iteration is written to `iter_N.partial-<id>`, fsynced and renamed; then `manifest.json` and Megatron's tracker
    file are replaced atomically. The manifest lists the newest iteration and the auxiliary files; every iteration has its
    own copy, `iter_N/manifest.json`. Metrics and reports change during the run and are not listed.
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
    def open(
        cls,
        target: Path,
        *,
        kind: Kind,
        inputs: Inputs,
        overwrite: bool = False,
        extend: bool = False,
        extendable: Collection[str] = (),
    ) -> Self:
        """Begin a run, or resume an unfinished run with the same fingerprint (even with `overwrite`).

        With `extend`, a saved run that differs in options of `extendable` only is resumed as this run, finished or not.

        Raises:
            AlreadyDone: the run is finished.
            UserError: the target overlaps an input, holds something else, or is locked by another process.
        """
        check_overlap(target, inputs)
        clear_leftovers(target)
        parents = parents_of(inputs)
        fingerprint = run_fingerprint(invocation(), inputs, parents)
        if target.is_file():
            raise UserError(f"--target {target} is a file; a directory is published there")
        target.mkdir(parents=True, exist_ok=True)
        # A killed trainer's writer dies with it, at the end of what it is doing on the disk.
        descriptor = hold(target, patience=_WRITER_SECONDS if any(target.glob(f"*{PARTIAL}*")) else 0)
        try:
            if extend and _extends(target, fingerprint, parents, extendable):
                _write_record(target, fingerprint)
            elif not _resumable(target, fingerprint):
                check_target(
                    target, fingerprint=fingerprint, parents=parents, overwrite=overwrite, extendable=extendable
                )
                if any(target.iterdir()):
                    descriptor = _replace(target, descriptor)
            run = cls(target, kind=kind, fingerprint=fingerprint, parents=parents, descriptor=descriptor)
            run._restore()
        except BaseException:
            os.close(descriptor)
            raise
        return run

    def _restore(self) -> None:
        """Restore the manifest's state: remove partial and newer iterations, rewrite the tracker."""
        if not (self.path / RUN).exists():
            _write_record(self.path, self._fingerprint)
        self._manifest = read_manifest(self.path, flag="--target")
        self.iteration = self._manifest.iteration if self._manifest else None
        for leftover in sorted(self.path.glob(f"*{PARTIAL}*")):
            remove_tree(leftover)
            log(f"removed {leftover.name}, left by a killed run")
        for folder in self._iterations():
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

    def commit(
        self,
        iteration: int,
        *,
        facts: dict[str, Any],
        entries: dict[str, FileEntry] | None = None,
        finished: bool = False,
        keep: int = 2,
        protected: int | None = None,
    ) -> None:
        """Publish the iteration of the last `begin`; remove all but the newest `keep` iterations.

        Args:
            iteration: updates done.
            facts: of the manifest.
            entries: sizes and hashes of the iteration's files, if they are known; else they are read here.
            finished: whether the run ends with it.
            keep: newest iterations that stay.
            protected: a further iteration that stays.
        """
        name = iteration_name(iteration)
        if entries is None:
            entries = file_entries(self._partial, list(files_below(self._partial)))
        files = {f"{name}/{file}": entry for file, entry in entries.items()}
        files |= file_entries(self.path, list(files_below(self.path / HF_FILES)))
        manifest = Manifest(
            contract_version=written_version(self._kind, facts),
            kind=self._kind,
            state="finished" if finished else "running",
            iteration=iteration,
            identity=self._fingerprint,
            parents=self._parents,
            facts=facts,
            files=files,
            bytes=sum(entry.size for entry in files.values()),
            **origin(invocation()),
        )
        write_atomically(self._partial / MANIFEST, manifest.encode().encode())
        commit_directory(self._partial, self.path / name)
        self._record(manifest)
        for folder in self._iterations()[: -max(keep, 1)]:
            if protected is None or folder.name != iteration_name(protected):
                remove_tree(folder)

    @property
    def facts(self) -> dict[str, Any]:
        """The manifest's facts of the iteration to resume from."""
        return self._manifest.facts if self._manifest else {}

    def recorded(self) -> dict[str, FileEntry]:
        """Sizes and hashes of the iteration to resume from and of the auxiliary files."""
        return self._manifest.files if self._manifest else {}

    def fall_back(self, damage: str) -> int:
        """Make the iteration before the newest, which is damaged, the one to resume from. Returns it.

        Raises:
            StageError: there is none.
        """
        damaged = self.path / iteration_name(self.iteration or 0)
        older = [folder for folder in self._iterations() if folder < damaged and (folder / MANIFEST).is_file()]
        if not older:
            raise StageError(f"--target {damage}, and no earlier iteration is kept; begin again with --overwrite")
        manifest = read_manifest(older[-1], flag="--target")
        assert manifest is not None
        self._record(manifest)
        log(f"{damage}; resuming from {older[-1].name}")
        remove_tree(damaged)
        assert self.iteration is not None
        return self.iteration

    def _iterations(self) -> list[Path]:
        """The complete iterations, oldest first."""
        return sorted(path for path in self.path.glob("iter_*") if PARTIAL not in path.name)

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


def damage(directory: Path, entries: Mapping[str, FileEntry]) -> str | None:
    """The first of these files that is missing or has another size or content, in words; None if all are intact."""
    if found := misfit(directory, entries):
        return found
    entries = compared(entries)
    for name, digest in zip(entries, hash_files([directory / name for name in entries]), strict=True):
        if digest != entries[name].hash:
            return f"{directory / name} is damaged: its content has changed since it was saved"
    return None


def _replace(target: Path, descriptor: int) -> int:
    """Exchange a held target for an empty directory, which is locked before it is visible, and remove the old one."""
    fresh = target.with_name(f"{target.name}{PARTIAL}{secrets.token_hex(4)}")
    fresh.mkdir()
    held = lock(fresh)
    assert held is not None, "no other process knows its name"
    move_into_place(fresh, target)
    os.close(descriptor)
    return held


def _write_record(target: Path, fingerprint: str) -> None:
    record = {"identity": fingerprint, **origin(invocation())}
    write_atomically(target / RUN, (json.dumps(record, indent=1) + "\n").encode())


def _extends(target: Path, fingerprint: str, parents: list[Parent], extendable: Collection[str]) -> bool:
    """Whether the target holds saved iterations of a run that differs from this one in `extendable` options only."""
    manifest = read_manifest(target, flag="--target")
    if manifest is None or manifest.identity == fingerprint:
        return False
    difference = Difference.of(manifest.model_dump(), parents)
    if not difference.within(extendable):
        raise UserError(f"--target {target} holds a run with {difference}; --extend cannot change that")
    return True


def _resumable(target: Path, fingerprint: str) -> bool:
    """Whether the target holds an unfinished run of this fingerprint."""
    if recorded_fingerprint(target) != fingerprint:
        return False
    manifest = read_manifest(target, flag="--target")
    return manifest is None or manifest.state == "running"
