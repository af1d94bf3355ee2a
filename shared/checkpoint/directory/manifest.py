"""`manifest.json`: kind, files with hashes, and provenance of a published directory.

Written last: a directory with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from shared.checkpoint.files import files_below, hash_bytes, hash_file
from shared.errors import UserError
from shared.foreign_formats import indexed_prefix
from shared.invocation import Invocation

CONTRACT_VERSION = 2  # the newest that is read
# Versions that are written: readers of version 1 take adapters for damaged directories, or for models without weights.
_OF_MODELS_AND_DATA = 1
_OF_ADAPTERS = 2
ADAPTER = "adapter"  # the fact of a run directory that holds LoRA adapters only
MANIFEST = "manifest.json"
CARD = "README.md"  # the model card
_CARDS = {CARD, f"hf/{CARD}"}
Kind = Literal["hf", "megatron", "te", "tokenizer", "dataset", "result", "adapter"]
Inputs = Mapping[str, Path | Sequence[Path]]  # flag -> path or paths given to it

_SMALL = 64 << 20  # bytes; larger foreign files are fingerprinted by size and modification time


class FileEntry(BaseModel):
    """One file of a published directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int  # bytes
    hash: str  # "xxh3_128:<hex>"


class Parent(BaseModel):
    """One input of the command that published the directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    flag: str
    name: str  # last component of its path
    fingerprint: str  # `input_fingerprint`


class Manifest(BaseModel):
    """The content of `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    contract_version: int = _OF_MODELS_AND_DATA  # `written_version`
    kind: Kind
    state: Literal["finished", "running"] = "finished"  # running: a training run with a saved iteration, not finished
    iteration: int | None = None  # of a training run: the iteration that `files` lists
    tool: str
    version: str
    command: str
    options: dict[str, Any]  # every option, defaults included
    identity: str  # `run_fingerprint`
    revision: str | None  # git revision of the tool
    image: str | None  # container image
    parents: list[Parent]
    created: str  # ISO 8601, UTC
    facts: dict[str, Any]  # properties of the output: family, architecture, dtype, tensors, parameters ...
    bytes: int  # sum over `files`
    files: dict[str, FileEntry]  # relative path -> size and hash; readers trust no other file

    @field_validator("files")
    @classmethod
    def _below(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} is not below the directory")
        return files

    def encode(self) -> str:
        """The text of `manifest.json`."""
        return self.model_dump_json(indent=1) + "\n"


def read_manifest(directory: Path, *, flag: str) -> Manifest | None:
    """The manifest of a directory, None if it has none. UserError if it is damaged or of another contract version."""
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        content = json.loads(raw)
        version = content["contract_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{flag} {path} is damaged: not a manifest; publish the directory again") from None
    if version not in range(1, CONTRACT_VERSION + 1):
        raise UserError(
            f"{flag} {directory} has contract_version {version}, and this tool reads {CONTRACT_VERSION}; upgrade this tool "
            "to the version in its manifest.json"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{flag} {path} is damaged at {where}: {first['msg']}; publish the directory again") from None


def written_version(kind: Kind, facts: Mapping[str, Any]) -> int:
    """The contract version of a new directory: the oldest whose readers read it."""
    return _OF_ADAPTERS if kind == "adapter" or ADAPTER in facts else _OF_MODELS_AND_DATA


def compared(entries: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """The files that are compared with the manifest: all but model cards, which people edit after they are published."""
    return {name: entry for name, entry in entries.items() if name not in _CARDS}


def misfit(directory: Path, entries: Mapping[str, FileEntry]) -> str | None:
    """The first of these files that is missing or has another size, in words; None if there is none.

    A model card may be edited or removed.
    """
    for name, entry in compared(entries).items():
        file = directory / name
        if not file.is_file():
            return f"{file} is missing"
        if (size := file.stat().st_size) != entry.size:
            return f"{file} has {size} bytes instead of {entry.size}"
    return None


def input_fingerprint(path: Path) -> str:
    """Hash of an input: a file's content, a published directory's manifest, a foreign directory's file list, or, of the
    prefix of a Megatron pair, that of both files.

    Foreign files above 64 MiB, alone or in a directory, are hashed by size and modification time: "already done" is found
    without reading hundreds of gigabytes. A copy of them therefore has another fingerprint.
    """
    if path.is_file():
        status = path.stat()
        if status.st_size <= _SMALL:
            return hash_file(path)
        return hash_bytes(f"{status.st_size} {status.st_mtime_ns}".encode())
    manifest = path / MANIFEST
    if manifest.is_file():
        return f"sha256:{hashlib.sha256(manifest.read_bytes()).hexdigest()}"
    lines = []
    pair = [] if path.is_dir() or not indexed_prefix(path) else [Path(f"{path}{suffix}") for suffix in (".bin", ".idx")]
    for file in pair or files_below(path):
        status = file.stat()
        content = hash_file(file) if status.st_size <= _SMALL else str(status.st_mtime_ns)
        lines.append(f"{file.suffix if pair else file.relative_to(path)} {status.st_size} {content}")
    return hash_bytes("\n".join(lines).encode())


def parents_of(inputs: Inputs) -> list[Parent]:
    """The inputs as a manifest records them."""
    parents = []
    for flag, given in inputs.items():
        for path in [given] if isinstance(given, Path) else given:
            parents.append(Parent(flag=flag, name=path.resolve().name, fingerprint=input_fingerprint(path)))
    return parents


def run_fingerprint(invocation: Invocation, inputs: Inputs, parents: list[Parent]) -> str:
    """The run's fingerprint: hash of tool, command, options and inputs."""
    what = {
        "tool": invocation.tool,
        "command": invocation.command,
        "options": invocation.fingerprinted_options(inputs),
        "inputs": [[parent.flag, parent.fingerprint] for parent in parents],
    }
    return f"sha256:{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()}"


def origin(invocation: Invocation) -> dict[str, Any]:
    """The manifest fields of provenance: tool, version, command, options, revision, image, time."""
    return {
        "tool": invocation.tool,
        "version": invocation.version,
        "command": invocation.command,
        "options": invocation.options,
        "revision": os.environ.get("BATON_REVISION") or _git_revision(),
        "image": os.environ.get("BATON_IMAGE"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git_revision() -> str | None:
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return answer.stdout.strip() or None
