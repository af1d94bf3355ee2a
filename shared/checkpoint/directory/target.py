"""Checks of --target: overlap with inputs, leftovers of killed runs, and what --overwrite may replace."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from shared.checkpoint.copy.journal import is_attempt_at
from shared.checkpoint.directory.manifest import MANIFEST, Inputs, Manifest, read_manifest
from shared.checkpoint.files import remove_tree
from shared.console import log
from shared.errors import AlreadyDone, UserError

PARTIAL = ".partial-"
REPLACED = ".replaced-"
SHARDS = ".shards-of-"
RUN = "run.json"  # written at the start of a training run


def check_overlap(target: Path, inputs: Inputs) -> None:
    """Refuse a target equal to, above or below an input, and one that cannot be a directory."""
    if target.is_symlink():
        raise UserError(f"--target {target} is a link; give the directory itself")
    if not (above := next(path for path in target.absolute().parents if path.exists())).is_dir():
        raise UserError(f"--target {target}: {above} is a file; choose another directory")
    target_path = target.resolve()
    for flag, given in inputs.items():
        for path in [given] if isinstance(given, Path) else given:
            source = path.resolve()
            if source == target_path or source.is_relative_to(target_path) or target_path.is_relative_to(source):
                name = flag.replace("_", "-")
                raise UserError(f"--target {target} overlaps --{name} {path}; choose another directory")


def lock(directory: Path) -> int | None:
    """Lock a directory (flock). Returns the descriptor, None if a living process holds the lock.

    The kernel releases the lock at the end of the process, even after SIGKILL.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def recorded_fingerprint(directory: Path) -> str | None:
    """The fingerprint in a training run's run.json; None if the file is missing or damaged."""
    try:
        return json.loads((directory / RUN).read_text(encoding="utf-8"))["identity"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def clear_leftovers(target: Path, resume: str | None = None) -> tuple[Path | None, int | None]:
    """Remove partial directories of killed runs. UserError if a living process writes one.

    Returns (directory, lock descriptor) of a resumable one with fingerprint `resume`; (None, None) without one.
    """
    found: tuple[Path | None, int | None] = None, None
    if not target.parent.is_dir():
        return found
    for leftover in sorted(target.parent.glob(f"{_escaped(target.name)}{REPLACED}*")):
        if not target.exists():  # killed between the two renames of a replacement: the old target is complete
            leftover.rename(target)
            log(f"restored {target}: an earlier run was killed while replacing it")
        else:
            remove_tree(leftover)
    for leftover in sorted(target.parent.glob(f"{_escaped(target.name)}{PARTIAL}*")):
        descriptor = lock(leftover)
        if descriptor is None:
            if found[1] is not None:
                os.close(found[1])
            raise UserError(
                f"--target {target}: another process is writing it ({leftover.name}); wait for it or stop it"
            )
        if resume is not None and found[0] is None and is_attempt_at(leftover, resume):
            found = leftover, descriptor
            continue
        remove_tree(leftover)
        os.close(descriptor)
        log(f"removed {leftover.name}, left by a killed run")
    return found


def check_no_shards(target: Path, own: Path | None = None) -> None:
    """Refuse a target with unpublished shards (`--shard`) other than those in `own`."""
    for leftover in sorted(target.parent.glob(f"{_escaped(target.name)}{SHARDS}*")):
        if leftover != own:
            count = leftover.name.rpartition("-")[2]
            raise UserError(
                f"--target {target}: {leftover.name} holds parts of a conversion in {count} shards; finish it with "
                f"--shard publish/{count}, or remove that directory"
            )


def check_target(target: Path, *, fingerprint: str, overwrite: bool) -> Manifest | None:
    """Check by its content that the target may be written.

    Returns the manifest of the directory to replace, None without one.

    Raises:
        AlreadyDone: it holds the finished result of the same run.
        UserError: it holds something else, or a damaged result.
    """
    if not target.exists():
        return None
    if not target.is_dir():
        raise UserError(f"--target {target} is a file; a directory is published there")
    if not any(target.iterdir()):
        return None
    damaged = None
    try:
        manifest = read_manifest(target, flag="--target")
    except UserError as error:
        manifest, damaged = None, error
    if manifest is None and not damaged and not (target / RUN).exists():
        raise UserError(f"--target {target} exists and was not made by Baton; choose another or remove it yourself")
    if overwrite:
        return manifest
    if damaged:
        raise damaged
    if manifest is None:
        raise UserError(f"--target {target} holds an unfinished run of another command; finish it, or use --overwrite")
    if manifest.identity != fingerprint:
        raise UserError(
            f"--target {target} holds the result of `{manifest.tool} {manifest.command}` with other inputs or options; "
            "choose another directory or use --overwrite"
        )
    if manifest.state == "running":
        raise UserError(f"--target {target} holds an unfinished run; finish it, or use --overwrite")
    for name, entry in manifest.files.items():
        file = target / name
        if not file.is_file() or file.stat().st_size != entry.size:
            raise UserError(
                f"--target {target} is damaged ({name} is missing or truncated); use --overwrite to make it again"
            )
    raise AlreadyDone(f"already done: {target} ({MANIFEST} of {manifest.created})")


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
