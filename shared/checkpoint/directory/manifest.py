"""`manifest.json`: what a directory is, what it holds, where it came from.

It is written last, so that its presence is the proof.
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
from shared.invocation import Invocation

CONTRACT_VERSION = 1
MANIFEST = "manifest.json"
Kind = Literal["hf", "megatron", "te", "tokenizer", "dataset", "result"]
Inputs = Mapping[str, Path | Sequence[Path]]  # flag -> what it named

_SMALL = 64 << 20  # bytes; foreign files above this count by size and time, not content


class FileEntry(BaseModel):
    """One file of the directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int  # bytes
    hash: str  # "xxh3_128:<hex>"


class Parent(BaseModel):
    """One input of the command that made the directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    flag: str
    name: str  # the last part of its path
    fingerprint: str  # of its manifest, or of its content where it has none


class Manifest(BaseModel):
    """The record of a published directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    contract_version: int = CONTRACT_VERSION
    kind: Kind
    state: Literal["finished", "running"] = "finished"  # running: a training run that has saved, not ended
    iteration: int | None = None  # of a training run
    tool: str
    version: str
    command: str
    options: dict[str, Any]  # resolved, defaults included
    identity: str  # hash over what decides the result: the same identity is the same work
    revision: str | None  # git revision of the tool's source
    image: str | None  # container image the tool ran in
    parents: list[Parent]
    created: str  # ISO 8601, UTC
    facts: dict[str, Any]  # family, architecture, dtype, tensors, parameters ... what the stage says of its output
    bytes: int  # of all files
    files: dict[str, FileEntry]  # relative path -> entry; every file that a reader may trust

    @field_validator("files")
    @classmethod
    def _below(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} is not below the directory")
        return files

    def encode(self) -> str:
        """As written to disk."""
        return self.model_dump_json(indent=1) + "\n"


def read_manifest(directory: Path, *, flag: str) -> Manifest | None:
    """The manifest of a directory, or None if it has none; UserError if it cannot be trusted."""
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
    if version != CONTRACT_VERSION:
        raise UserError(
            f"{flag} {directory} follows contract version {version} and this tool reads {CONTRACT_VERSION}; "
            "use a newer version of the tool"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{flag} {path} is damaged at {where}: {first['msg']}; publish the directory again") from None


def input_fingerprint(path: Path) -> str:
    """What an input is: a file's content, a published directory's manifest, a foreign directory's files.

    Large files of a foreign directory count by size and modification time: reading hundreds of gigabytes to learn
    that nothing is to be done would cost more than being asked for --overwrite after a copy.
    """
    if path.is_file():
        return hash_file(path)
    manifest = path / MANIFEST
    if manifest.is_file():
        return f"sha256:{hashlib.sha256(manifest.read_bytes()).hexdigest()}"
    lines = []
    for file in files_below(path):
        status = file.stat()
        content = hash_file(file) if status.st_size <= _SMALL else str(status.st_mtime_ns)
        lines.append(f"{file.relative_to(path)} {status.st_size} {content}")
    return hash_bytes("\n".join(lines).encode())


def parents_of(inputs: Inputs) -> list[Parent]:
    """The inputs as the manifest records them."""
    parents = []
    for flag, given in inputs.items():
        for path in [given] if isinstance(given, Path) else given:
            parents.append(Parent(flag=flag, name=path.resolve().name, fingerprint=input_fingerprint(path)))
    return parents


def run_fingerprint(invocation: Invocation, inputs: Inputs, parents: list[Parent]) -> str:
    """Equal for two commands exactly when they are the same work."""
    what = {
        "tool": invocation.tool,
        "command": invocation.command,
        "options": invocation.fingerprinted_options(inputs),
        "inputs": [[parent.flag, parent.fingerprint] for parent in parents],
    }
    return f"sha256:{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()}"


def origin(invocation: Invocation) -> dict[str, Any]:
    """The fields of a manifest that say which program made the directory, and when."""
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
