"""Open checkpoint directories; incomplete or damaged ones are refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from shared.checkpoint.directory.manifest import MANIFEST, Kind, Manifest, read_manifest
from shared.checkpoint.directory.target import PARTIAL, RUN
from shared.checkpoint.files import hash_file, hash_files
from shared.checkpoint.formats.megatron_lm_ranks import rank_files
from shared.checkpoint.formats.safetensors_file import weight_map_of
from shared.checkpoint.formats.swiss_army_transformer import rank_states
from shared.checkpoint.formats.transformer_engine_reader import LAYERS
from shared.console import log, progress
from shared.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
_ANNOUNCE = 4 << 30  # bytes above which verification shows its progress


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete directory."""

    path: Path
    kind: Kind
    manifest: Manifest | None = field(repr=False)  # None: a foreign directory, not published by Baton

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


def iteration_name(iteration: int) -> str:
    """`iter_0000100`, as in Megatron-LM."""
    return f"iter_{iteration:07d}"


def tracked_iteration(directory: Path) -> str:
    """The iteration folder in Megatron's tracker file."""
    text = (directory / TRACKER).read_text(encoding="utf-8").strip()
    return text if text == "release" else iteration_name(int(text))


def open_checkpoint(
    path: Path,
    *,
    kinds: Sequence[Kind],
    flag: str,
    verify: Literal["content", "small", "sizes"] = "content",
    per_rank: Kind | None = None,
    iteration: int | None = None,
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

    Raises:
        UserError: not of these kinds, incomplete or damaged; the iteration is not kept.
    """
    if not path.is_dir():
        raise UserError(f"{flag} {path} is not a directory")
    if PARTIAL in path.name:
        raise UserError(f"{flag} {path} is incomplete, left by a killed run; run that command again")
    manifest = read_manifest(path, flag=flag)
    if iteration is not None:
        manifest = _iteration_manifest(path, manifest, iteration, flag)
    if manifest is None:
        kind = _foreign_kind(path, flag, per_rank)
    else:
        kind = manifest.kind
        _verify(path, manifest, flag, verify)
        if manifest.state == "running":
            log(f"{path} is an unfinished training run; reading iteration {manifest.iteration}")
    if kind not in kinds:
        lacks = " (config.json is missing)" if kind == "tokenizer" else ""
        raise UserError(f"{flag} {path} is a {kind} directory{lacks}; wanted: {' or '.join(kinds)}")
    return Checkpoint(path=path, kind=kind, manifest=manifest)


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
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{flag} {file} is missing, though {MANIFEST} lists it; publish the directory again")
        if (size := file.stat().st_size) != entry.size:
            raise UserError(f"{flag} {file} has {size} bytes instead of {entry.size}; publish the directory again")
    if manifest.iteration is None:  # older iterations of a run directory are not in the manifest
        for file in path.iterdir():
            if file.suffix in WEIGHTS and file.name not in manifest.files:
                raise UserError(f"{flag} {file} is not in {MANIFEST}: weights of unknown origin; move it away")
    if verify != "sizes" and os.environ.get("RANK", "0") == "0":  # one rank of a job reads every byte
        names = [name for name in manifest.files if verify == "content" or not name.endswith(WEIGHTS)]
        _verify_content(path, manifest, names, flag)


def verify_content(checkpoint: Checkpoint, *, flag: str) -> None:
    """Compare the hashes of all files, after `open_checkpoint(verify="sizes")`. UserError names a damaged file."""
    if checkpoint.manifest:
        _verify_content(checkpoint.path, checkpoint.manifest, list(checkpoint.manifest.files), flag)


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


def _foreign_kind(path: Path, flag: str, per_rank: Kind | None) -> Kind:
    if (path / RUN).exists():
        raise UserError(f"{flag} {path} is a training run that has not saved an iteration yet; run its command again")
    if (path / TRACKER).is_file():
        return _check_foreign_megatron(path, flag, per_rank)
    if rank_states(path):
        if per_rank != "hf":
            raise UserError(
                f"{flag} {path} is a SwissArmyTransformer checkpoint, one file per rank; `convert to-megatron` reads it"
            )
        return "hf"
    if (path / "config.json").is_file():
        return _check_foreign_hf(path, flag)
    if (path / LAYERS).is_file():
        return "te"  # its weights are checked on reading
    if (path / "tokenizer.json").is_file():
        return "tokenizer"
    raise UserError(f"{flag} {path} holds no checkpoint: neither {MANIFEST}, config.json nor {TRACKER}")


def _check_foreign_megatron(path: Path, flag: str, per_rank: Kind | None) -> Kind:
    try:
        iteration = path / tracked_iteration(path)
    except ValueError:
        raise UserError(f"{flag} {path / TRACKER} names no iteration; write its number or 'release' there") from None
    if rank_files(iteration):
        if per_rank != "megatron":
            raise UserError(
                f"{flag} {iteration} is a legacy Megatron-LM checkpoint, one file per rank; "
                "`convert to-hf --hf-files DIR` reads it"
            )
    elif not (iteration / ".metadata").is_file():
        raise UserError(f"{flag} {iteration}/.metadata is missing: not a complete torch_dist checkpoint")
    return "megatron"


def _check_foreign_hf(path: Path, flag: str) -> Kind:
    for index in sorted(path.glob("*.index.json")):
        for name in sorted({*weight_map_of(index, flag).values()}):
            if not (path / name).is_file():
                raise UserError(f"{flag} {path / name} is missing, though {index.name} names it; fetch it again")
        return "hf"
    if not any(file.suffix in WEIGHTS for file in path.iterdir()):
        raise UserError(f"{flag} {path} has a config.json and no weights; fetch the model again")
    return "hf"
