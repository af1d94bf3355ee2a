"""Open checkpoint directories; incomplete or damaged ones are refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from shared.checkpoint.directory.adapter_directory import refuse_adapter, refuse_adapter_run
from shared.checkpoint.directory.auxiliary_files import check_auxiliary_files
from shared.checkpoint.directory.manifest import MANIFEST, Kind, Manifest, compared, misfit, read_manifest
from shared.checkpoint.directory.recognition import (
    Recognition,
    directory_above,
    is_iteration_folder,
    iteration_name,
    recognize,
    tracked_iteration,
)
from shared.checkpoint.directory.target import PARTIAL
from shared.checkpoint.files import check_not_stand_in, files_below, hash_file, hash_files
from shared.console import log, progress
from shared.errors import UserError

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
_ANNOUNCE = 4 << 30  # bytes above which verification shows its progress


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete directory."""

    path: Path
    kind: Kind
    manifest: Manifest | None = field(repr=False)  # None: a foreign directory, not published by Baton
    rank_files: tuple[Path, ...] = ()  # of a SwissArmyTransformer checkpoint
    ignored: tuple[str, ...] = ()  # of a foreign directory: weights that are not read; folders end in a slash

    @property
    def facts(self) -> dict[str, Any]:
        """The manifest's facts; empty for a foreign directory."""
        return self.manifest.facts if self.manifest else {}

    @property
    def iteration_path(self) -> Path:
        """The torch_dist directory of a Megatron checkpoint: `iter_0000100` or `release`."""
        if self.manifest and self.manifest.iteration is not None:
            return self.path / iteration_name(self.manifest.iteration)
        return self.path / tracked_iteration(self.path)

    @property
    def hf_files(self) -> Path:
        """The directory of auxiliary files: config.json, tokenizer ..."""
        return self.path / {"megatron": "hf", "te": "hf", "dataset": "tokenizer"}.get(self.kind, ".")


def open_checkpoint(
    path: Path,
    *,
    kinds: Sequence[Kind],
    flag: str,
    verify: Literal["content", "small", "sizes"] = "content",
    per_rank: Kind | None = None,
    iteration: int | None = None,
    adapters: bool = False,
) -> Checkpoint:
    """A complete directory of one of `kinds`.

    A published directory is checked against its manifest, a foreign one against its own index.

    Args:
        path: the directory.
        kinds: accepted kinds.
        flag: its flag, for messages.
        verify: hashes to compare with the manifest, besides the sizes. "content": every file. "small": every file but
            weights, left to `content_checks`. "sizes": none. Ranks above 0 compare sizes only.
        per_rank: also accept per-rank checkpoints of this kind: legacy Megatron-LM ("megatron"), SwissArmyTransformer
            ("hf").
        iteration: of a run directory, instead of the newest.
        adapters: also accept a run directory that holds LoRA adapters without their base.

    Raises:
        UserError: not of these kinds, incomplete or damaged; the iteration is not kept; adapters without a base.
    """
    if not path.is_dir():
        raise UserError(f"{flag} {path} is not a directory")
    if PARTIAL in path.name:
        raise UserError(f"{flag} {path} is incomplete, left by a killed run; run that command again")
    _check_top(path, flag)
    manifest = read_manifest(path, flag=flag)
    if manifest is not None and manifest.iteration is not None and is_iteration_folder(path):
        raise UserError(
            f"{flag} {path} is one iteration of a training run; give the directory above it, {directory_above(path)} (with "
            f"--iteration {manifest.iteration} for `convert to-hf`, `pretrain train` and `sft train`)"
        )
    if iteration is not None:
        manifest = _iteration_manifest(path, manifest, iteration, flag)
    if manifest is None:
        if "tokenizer" not in kinds:  # an adapter may hold one
            refuse_adapter(path, flag)
        found = recognize(path, kinds=kinds, flag=flag, per_rank=per_rank)
    else:
        found = Recognition(kind=manifest.kind)
        if not adapters:
            refuse_adapter_run(path, manifest, flag)
        _verify(path, manifest, flag, verify)
        if manifest.state == "running":
            log(f"{path} is an unfinished training run; reading iteration {manifest.iteration}")
    if found.kind not in kinds:
        lacks = " (config.json is missing)" if found.kind == "tokenizer" else ""
        commands = [_CONVERSIONS[found.kind, kind] for kind in kinds if (found.kind, kind) in _CONVERSIONS]
        fix = f"; `{commands[0].format(path=path)}` makes one of it" if commands else ""
        raise UserError(f"{flag} {path} is a {found.kind} directory{lacks}; wanted: {' or '.join(kinds)}{fix}")
    checkpoint = Checkpoint(
        path=path, kind=found.kind, manifest=manifest, rank_files=found.rank_files, ignored=found.ignored
    )
    if manifest is None:
        _check_foreign_files(checkpoint, found, kinds, flag)
    if found.ignored:
        held = f"{found.weights[0]}{' and others' if len(found.weights) > 1 else ''}" if found.weights else "its ranks"
        log(f"{flag} {path}: weights are read from {held}; ignored: {', '.join(found.ignored)}")
    return checkpoint


# (kind that is there, kind that is wanted) -> the command that makes it
_CONVERSIONS: dict[tuple[Kind, Kind], str] = {
    ("hf", "megatron"): "convert to-megatron --source {path} --target DIR",
    ("megatron", "hf"): "convert to-hf --source {path} --target DIR",
    ("te", "hf"): "convert to-hf --source {path} --target DIR",
    ("adapter", "hf"): "convert merge-lora --source BASE --adapter {path} --target DIR",
}


def _check_top(directory: Path, flag: str) -> None:
    for file in sorted(directory.iterdir()) if directory.is_dir() else ():
        if file.is_file() and file.suffix not in WEIGHTS:
            check_not_stand_in(file, flag)


def _check_foreign_files(checkpoint: Checkpoint, found: Recognition, kinds: Sequence[Kind], flag: str) -> None:
    """UserError if a file that is read or copied is a git-lfs pointer or a server's error page."""
    if "tokenizer" in kinds:  # nothing else is read
        _check_top(checkpoint.hf_files, flag)
        return
    if checkpoint.hf_files.is_dir():
        check_auxiliary_files(checkpoint.hf_files, flag)
    files = [*(checkpoint.path / name for name in found.weights), *found.rank_files]
    if checkpoint.kind == "megatron":
        files += files_below(checkpoint.iteration_path)
    elif checkpoint.kind == "te":
        files += checkpoint.path.glob("*.safetensors")
    for file in sorted(files):
        check_not_stand_in(file, flag)


def _iteration_manifest(path: Path, newest: Manifest | None, iteration: int, flag: str) -> Manifest:
    if newest is not None and newest.iteration == iteration:
        return newest
    manifest = read_manifest(path / iteration_name(iteration), flag=flag)
    if manifest is None:
        kept = sorted(int(file.parent.name.removeprefix("iter_")) for file in path.glob(f"iter_*[0-9]/{MANIFEST}"))
        raise UserError(
            f"--iteration {iteration} is not in {flag} {path}, which has {', '.join(map(str, kept)) or 'none'}; give one of "
            "these, or leave --iteration out for the newest"
        )
    return manifest


def _verify(path: Path, manifest: Manifest, flag: str, verify: str) -> None:
    for file in (path / name for name in manifest.files if (path / name).is_file()):
        check_not_stand_in(file, flag)
    if found := misfit(path, manifest.files):
        raise UserError(f"{flag} {found}, though {MANIFEST} lists it; publish the directory again")
    if manifest.iteration is None:  # older iterations of a run directory are not in the manifest
        for file in path.iterdir():
            if file.suffix in WEIGHTS and file.name not in manifest.files:
                raise UserError(f"{flag} {file} is not in {MANIFEST}: weights of unknown origin; move it away")
    if verify != "sizes" and os.environ.get("RANK", "0") == "0":  # one rank of a job reads every byte
        names = [name for name in compared(manifest.files) if verify == "content" or not name.endswith(WEIGHTS)]
        _verify_content(path, manifest, names, flag)


def verify_content(checkpoint: Checkpoint, *, flag: str) -> None:
    """Compare the hashes of all files, after `open_checkpoint(verify="sizes")`. UserError names a damaged file."""
    if checkpoint.manifest:
        _verify_content(checkpoint.path, checkpoint.manifest, list(compared(checkpoint.manifest.files)), flag)


def _verify_content(path: Path, manifest: Manifest, names: Sequence[str], flag: str) -> None:
    paths = [path / name for name in names]
    if manifest.bytes > _ANNOUNCE:
        with progress(manifest.bytes, "bytes", f"verifying {path.name}") as advance:
            found = hash_files(paths, advance)
    else:
        found = hash_files(paths)
    for name, digest in zip(names, found, strict=True):
        _check_hash(path / name, digest, manifest.files[name].hash, flag)


def _check_hash(path: Path, found: str, wanted: str, flag: str) -> None:
    if found != wanted:
        raise UserError(f"{flag} {path} is damaged: its content does not match {MANIFEST}; publish it again")


def content_checks(checkpoint: Checkpoint, sources: Iterable[Path], *, flag: str) -> list[Callable[[], None]]:
    """Hash checks of the source files against the manifest, to run during the conversion.

    Each raises UserError on damage. The caller publishes only after all have passed.
    """
    if checkpoint.manifest is None:
        return []

    def check(path: Path, wanted: str) -> None:
        _check_hash(path, hash_file(path), wanted, flag)

    entries = {checkpoint.path / name: entry for name, entry in checkpoint.manifest.files.items()}
    return [partial(check, path, entries[path].hash) for path in sorted(sources) if path in entries]
