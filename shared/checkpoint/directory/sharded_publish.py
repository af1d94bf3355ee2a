"""Sharded publishing (`--shard`): several processes write one directory over a shared file system, no network.

`--shard 2/4` writes its share of the files to `TARGET.shards-of-4/2-of-4/`, published atomically. `shard.json` there records
the file hashes and the run's fingerprint. `--shard publish/4` requires all four records with one fingerprint. It renames the
files into one directory, writes auxiliary files and manifest, and publishes. It reads no weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.checkpoint.copy.journal import JOURNAL, is_attempt_at, plan_key
from shared.checkpoint.copy.operations import FilePlan
from shared.checkpoint.copy.worker_pool import Advance
from shared.checkpoint.directory.manifest import Inputs, Kind, Parent, parents_of, run_fingerprint
from shared.checkpoint.directory.publish import Checks, Publication, move_into_place, publish
from shared.checkpoint.directory.target import (
    PARTIAL,
    SHARDS,
    Difference,
    check_no_shards,
    check_overlap,
    check_target,
    hold,
    lock,
)
from shared.checkpoint.files import remove_tree, sync, sync_tree, write_atomically
from shared.console import log
from shared.errors import AlreadyDone, UserError
from shared.invocation import invocation

_RECORD = "shard.json"
_ASSEMBLED = "whole"


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """The value of `--shard`: `2/4` writes the second of four shards, `publish/4` publishes them."""

    index: int | None  # from 1; None: publish
    count: int

    @staticmethod
    def parse(text: str) -> ShardSpec:
        found = re.fullmatch(r"(\d+|publish)/(\d+)", text)
        if found is None or not int(found[2]):
            raise UserError(f"--shard {text}: give 1/4 to 4/4 for the shards, then publish/4")
        index, count = None if found[1] == "publish" else int(found[1]), int(found[2])
        if index is not None and not 1 <= index <= count:
            raise UserError(f"--shard {text}: shards are counted from 1/{count} to {count}/{count}")
        return ShardSpec(index=index, count=count)

    @property
    def label(self) -> str:
        return f"{self.index}-of-{self.count}"


def assign_files(files: Sequence[FilePlan], shard: ShardSpec) -> list[FilePlan]:
    """The files of one shard: contiguous, balanced by bytes."""
    total = sum(file.size for file in files)
    assigned, position = [], 0
    for file in files:
        middle = position + file.size / 2
        if min(int(middle * shard.count / max(total, 1)), shard.count - 1) + 1 == shard.index:
            assigned.append(file)
        position += file.size
    return assigned


@contextlib.contextmanager
def publish_sharded(
    target: Path, *, kind: Kind, inputs: Inputs, overwrite: bool, shard: ShardSpec | None
) -> Iterator[Publication]:
    """`publish`, by one process (`shard=None`) or sharded.

    Raises:
        AlreadyDone: the same run has published the target, or has written this shard.
        UserError: as `publish`; shards of another count exist; `publish/N` finds a shard missing or of another run.
    """
    if shard is None:
        with publish(target, kind=kind, inputs=inputs, overwrite=overwrite, resumable=True) as out:
            yield out
        return
    check_overlap(target, inputs)
    parents = parents_of(inputs)
    fingerprint = run_fingerprint(invocation(), inputs, parents)
    staging = target.with_name(f"{target.name}{SHARDS}{shard.count}")
    check_no_shards(target, own=staging)
    check_target(target, fingerprint=fingerprint, parents=parents, overwrite=overwrite)
    work = _ShardWork(fingerprint=fingerprint, options=invocation().fingerprinted_options(inputs), parents=parents)
    with contextlib.ExitStack() as stack:
        if shard.index is not None:
            out = stack.enter_context(_write_shard(staging, shard, work))
        else:
            if target.is_dir():
                stack.callback(os.close, hold(target))
            out = stack.enter_context(_publish_shards(staging, shard, work, target, kind))
        yield out


@dataclass(frozen=True, kw_only=True)
class _ShardWork:
    """Identity of the run, recorded with each shard."""

    fingerprint: str
    options: dict[str, Any]
    parents: list[Parent]

    def record(self, shard: ShardSpec, plan: str, hashes: dict[str, str]) -> dict[str, Any]:
        return {
            "shard": shard.label,
            "identity": self.fingerprint,
            "version": invocation().version,
            "options": self.options,
            "inputs": [[parent.flag, parent.fingerprint] for parent in self.parents],
            "plan": plan,
            "files": hashes,
        }

    def difference(self, record: dict[str, Any]) -> str:
        """How a shard's run differs from this one, for messages; empty if it does not."""
        parents = [{"flag": flag, "fingerprint": fingerprint} for flag, fingerprint in record["inputs"]]
        here = invocation()
        found = Difference.of({"tool": here.tool, "command": here.command, "parents": parents} | record, self.parents)
        if found:
            return f"was written with {found}"
        if here.version != record["version"]:
            return f"was written by version {record['version']}, this is {here.version}"
        return "" if self.fingerprint == record["identity"] else "was written by another command"


class _ShardPublication(Publication):
    """One shard: its share of the file plans, no auxiliary files."""

    writes_auxiliary_files = False

    def __init__(self, path: Path, work: str, shard: ShardSpec) -> None:
        super().__init__(path, work)
        self.shard = shard
        self.plan = ""

    def own_files(self, files: Sequence[FilePlan]) -> list[FilePlan]:
        return assign_files(files, self.shard)

    def write(
        self, files: Sequence[FilePlan], *, workers: int, advance: Advance, checks: Checks = lambda sources: ()
    ) -> None:
        self.plan = plan_key(files)
        super().write(files, workers=workers, advance=advance, checks=checks)


@contextlib.contextmanager
def _write_shard(staging: Path, shard: ShardSpec, work: _ShardWork) -> Iterator[Publication]:
    complete = staging / shard.label
    record = _read_record(complete)
    if record is not None and not work.difference(record) and _all_there(staging, complete, record):
        raise AlreadyDone(
            f"already done: shard {shard.index} of {shard.count}; when all are, --shard publish/{shard.count}"
        )
    staging.mkdir(parents=True, exist_ok=True)
    partial, lock_descriptor = None, None
    for leftover in sorted(staging.glob(f"{shard.label}{PARTIAL}*")):
        descriptor = lock(leftover)
        if descriptor is None:
            raise UserError(
                f"--shard {shard.index}/{shard.count}: another process is writing it; wait for it or stop it"
            )
        if partial is None and is_attempt_at(leftover, work.fingerprint):
            partial, lock_descriptor = leftover, descriptor
        else:
            remove_tree(leftover)
            os.close(descriptor)
    if partial is None:
        partial = staging / f"{shard.label}{PARTIAL}{secrets.token_hex(4)}"
        partial.mkdir()
        lock_descriptor = lock(partial)
    try:
        out = _ShardPublication(partial, f"{work.fingerprint} {invocation().version}", shard)
        yield out
        (partial / JOURNAL).unlink()
        sync_tree(partial)
        files = {name: {"size": entry.size, "hash": entry.hash} for name, entry in out.entries().items()}
        content = json.dumps(work.record(shard, out.plan, files), indent=1)  # type: ignore[arg-type]
        write_atomically(partial / _RECORD, content.encode())
        if complete.exists():
            remove_tree(complete)
        partial.rename(complete)
        sync(staging)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException:
        remove_tree(partial)
        with contextlib.suppress(OSError):
            staging.rmdir()  # fails if other shards are there: they stay
        raise
    finally:
        if lock_descriptor is not None:
            os.close(lock_descriptor)
    log(
        f"shard {shard.index} of {shard.count} is written; when all are, run the same command with --shard publish/{shard.count}"
    )


class _ShardsPublication(Publication):
    """The directory assembled from shards by renames."""

    def __init__(
        self, path: Path, work: str, staging: Path, shard: ShardSpec, records: dict[int, dict[str, Any]]
    ) -> None:
        super().__init__(path, work)
        self._staging, self._shard, self._records = staging, shard, records

    def own_files(self, files: Sequence[FilePlan]) -> list[FilePlan]:
        return []

    def write(
        self, files: Sequence[FilePlan], *, workers: int, advance: Advance, checks: Checks = lambda sources: ()
    ) -> None:
        renames: list[tuple[Path, Path]] = []
        for index, record in self._records.items():
            if record["plan"] != plan_key(files):
                raise UserError(f"shard {index} of {self._shard.count} was written for other files; run it again")
            folder = self._staging / f"{index}-of-{self._shard.count}"
            for file in assign_files(files, ShardSpec(index=index, count=self._shard.count)):
                place = _place(self._staging, folder, file.name)
                if place is None or place.stat().st_size != file.size:
                    raise UserError(
                        f"shard {index} of {self._shard.count}: {file.name} is missing or truncated; run it again"
                    )
                renames.append((place, self.path / file.name))
                self.record_hash(file.name, record["files"][file.name]["hash"])
        shard_files = {place for _, place in renames}
        for path in [path for path in self.path.rglob("*") if path.is_file() and path not in shard_files]:
            path.unlink()  # left by a killed `publish/N`
        for place, final in renames:
            if place != final:
                final.parent.mkdir(parents=True, exist_ok=True)
                place.rename(final)


@contextlib.contextmanager
def _publish_shards(
    staging: Path, shard: ShardSpec, work: _ShardWork, target: Path, kind: Kind
) -> Iterator[Publication]:
    count = shard.count
    if not staging.is_dir():
        raise UserError(
            f"--shard publish/{count}: {staging} is not there; write the shards 1/{count} to {count}/{count} first"
        )
    records: dict[int, dict[str, Any]] = {}
    for index in range(1, count + 1):
        record = _read_record(staging / f"{index}-of-{count}")
        if record is None:
            begun = any(staging.glob(f"{index}-of-{count}{PARTIAL}*"))
            state = "is not finished" if begun else "is missing"
            raise UserError(
                f"--shard publish/{count}: shard {index} of {count} {state}; run --shard {index}/{count} first"
            )
        if why := work.difference(record):
            raise UserError(
                f"--shard publish/{count}: shard {index} of {count} {why}; run --shard {index}/{count} again, or publish "
                "with what it was written with"
            )
        records[index] = record
    lock_descriptor = lock(staging)
    if lock_descriptor is None:
        raise UserError(f"--shard publish/{count}: another process is publishing {target}; wait for it or stop it")
    try:
        assembled = staging / _ASSEMBLED
        assembled.mkdir(exist_ok=True)
        out = _ShardsPublication(assembled, work.fingerprint, staging, shard, records)
        yield out
        out.finalize(kind, work.fingerprint, work.parents)
        move_into_place(assembled, target)
        remove_tree(staging)
    finally:
        os.close(lock_descriptor)


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((folder / _RECORD).read_bytes()))
    except FileNotFoundError:
        return None


def _all_there(staging: Path, folder: Path, record: dict[str, Any]) -> bool:
    places = {name: _place(staging, folder, name) for name in record["files"]}
    return all(p is not None and p.stat().st_size == record["files"][n]["size"] for n, p in places.items())


def _place(staging: Path, folder: Path, name: str) -> Path | None:
    """Path of a shard's file. A killed `publish/N` may have moved it to the assembled directory."""
    for place in (folder / name, staging / _ASSEMBLED / name):
        if place.is_file():
            return place
    return None
