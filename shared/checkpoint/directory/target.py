"""Checks of --target: overlap with inputs, leftovers of killed runs, and what --overwrite may replace."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from shared.checkpoint.copy.journal import is_attempt_at
from shared.checkpoint.directory.manifest import MANIFEST, Inputs, Manifest, Parent, misfit, read_manifest
from shared.checkpoint.files import remove_tree
from shared.console import log
from shared.errors import AlreadyDone, UserError
from shared.invocation import invocation

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


def hold(target: Path, patience: float = 0) -> int:
    """Lock an existing target before its content is judged or replaced. Returns the descriptor.

    `patience`: seconds to wait for a process that is about to end.

    Raises:
        UserError: a living process holds the lock, or has just replaced the directory.
    """
    deadline = time.monotonic() + patience
    while (descriptor := lock(target)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if descriptor is None:
        raise UserError(f"--target {target}: another process is writing it; wait for it or stop it")
    if not os.path.samestat(os.fstat(descriptor), target.stat()):
        os.close(descriptor)
        raise UserError(f"--target {target}: another process has just replaced it; look at it, then run this again")
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


def check_target(
    target: Path,
    *,
    fingerprint: str,
    parents: Sequence[Parent],
    overwrite: bool,
    extendable: Collection[str] = (),
) -> Manifest | None:
    """Check by its content that the target may be written.

    Args:
        target: the directory.
        fingerprint: of this command.
        parents: its inputs.
        overwrite: whether a directory of Baton's may be replaced.
        extendable: options that `--extend` may change, for the message.

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
        raise UserError(
            f"--target {target} holds an unfinished run with {Difference.of(_run_record(target), parents)}; "
            "repeat its command to finish it, or use --overwrite"
        )
    if manifest.identity != fingerprint:
        held = (
            "an unfinished run"
            if manifest.state == "running"
            else f"the result of `{manifest.tool} {manifest.command}`"
        )
        difference = Difference.of(manifest.model_dump(), parents)
        extend = ", or --extend to go on from it" if difference.within(extendable) else ""
        raise UserError(
            f"--target {target} holds {held} with {difference}; choose another directory or use --overwrite{extend}"
        )
    if manifest.state == "running":
        raise UserError(f"--target {target} holds an unfinished run; finish it, or use --overwrite")
    if found := misfit(target, manifest.files):
        raise UserError(f"--target {target} is damaged ({found}); use --overwrite to make it again")
    raise AlreadyDone(f"already done: {target} ({MANIFEST} of {manifest.created})")


def _run_record(target: Path) -> dict[str, Any]:
    """Tool, command and options in a training run's run.json; empty if it is damaged."""
    try:
        record = json.loads((target / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


@dataclass(frozen=True)
class Difference:
    """How a recorded run differs from the running command. As text: the end of "holds a run with ..."."""

    options: dict[str, tuple[Any, Any]]  # name -> recorded value, value now
    elsewhere: str  # in words: another command, other inputs; empty if only options differ

    @classmethod
    def of(cls, record: Mapping[str, Any], parents: Sequence[Parent]) -> Self:
        """From a manifest or run.json. `parents`: the inputs of the running command."""
        current = invocation()
        if (record.get("tool"), record.get("command")) != (current.tool, current.command):
            return cls({}, "another command")
        here = current.compared_options(dict.fromkeys(parent.flag for parent in parents))
        there = record.get("options", {})
        options = {name: (there.get(name), here[name]) for name in here if here[name] != there.get(name)}
        recorded, now = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
        for parent in record.get("parents", []):
            recorded[parent["flag"]].append(parent["fingerprint"])
        for given in parents:
            now[given.flag].append(given.fingerprint)
        flags = sorted(flag for flag in now | recorded if recorded and recorded[flag] != now[flag])
        shown = " and ".join(f"--{flag.replace('_', '-')}" for flag in flags)
        return cls(options, f"another {shown}, or its content has changed" if flags else "")

    def __bool__(self) -> bool:
        return bool(self.options or self.elsewhere)

    def within(self, names: Collection[str]) -> bool:
        """Whether the runs differ in some of these options, and in nothing else."""
        return bool(self.options) and not self.elsewhere and set(self.options) <= set(names)

    def __str__(self) -> str:
        if self.elsewhere:
            return self.elsewhere
        if not self.options:
            return "other inputs or options"
        shown = [
            f"--{name.replace('_', '-')} {_shown(there)}, now {_shown(here)}"
            for name, (there, here) in self.options.items()
        ]
        return f"other options ({'; '.join(shown)})"


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
