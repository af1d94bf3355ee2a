"""Open a checkpoint directory, and refuse one that is not whole."""

from __future__ import annotations

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
    """A directory that is whole."""

    path: Path
    kind: Kind
    manifest: Manifest | None = field(repr=False)  # None: made by somebody else's program

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage that made it says of it; empty for a foreign directory."""
        return self.manifest.facts if self.manifest else {}

    @property
    def iteration_path(self) -> Path:
        """The torch_dist directory of a Megatron checkpoint."""
        if self.manifest and self.manifest.iteration is not None:
            return self.path / iteration_name(self.manifest.iteration)
        return self.path / tracked_iteration(self.path)

    @property
    def hf_files(self) -> Path:
        """The directory that holds the tokenizer and, of a model, config.json and what else travels with weights."""
        return self.path / {"megatron": "hf", "te": "hf", "dataset": "tokenizer"}.get(self.kind, ".")


def iteration_name(iteration: int) -> str:
    """`iter_0000100`, Megatron-LM's name."""
    return f"iter_{iteration:07d}"


def tracked_iteration(directory: Path) -> str:
    """The sub-directory that Megatron's tracker file points at."""
    text = (directory / TRACKER).read_text(encoding="utf-8").strip()
    return text if text == "release" else iteration_name(int(text))


def open_checkpoint(
    path: Path,
    *,
    kinds: Sequence[Kind],
    flag: str,
    verify: Literal["content", "small", "sizes"] = "content",
    per_rank: Kind | None = None,
) -> Checkpoint:
    """A directory of one of `kinds`, checked to be whole.

    A Baton directory must agree with its manifest in every file's size and, with `verify="content"`, hash; with
    "small", in the hashes of all that are no weights, and the others are for `content_checks`. A foreign Hugging Face or
    Megatron directory must have what its own index names. `ranks`: a directory of this kind may also be one of a file for
    each rank: Megatron-LM's from before torch_dist, or as hf SwissArmyTransformer's.

    Raises:
        UserError: one line that names the file and the mend.
    """
    if not path.is_dir():
        raise UserError(f"{flag} {path} is not a directory")
    if PARTIAL in path.name:
        raise UserError(f"{flag} {path} was left by a killed run and is not whole; run that stage again")
    manifest = read_manifest(path, flag=flag)
    if manifest is None:
        kind = _foreign_kind(path, flag, per_rank)
    else:
        kind = manifest.kind
        _verify(path, manifest, flag, verify)
        if manifest.state == "running":
            log(f"{path} is an unfinished run; reading iteration {manifest.iteration}")
    if kind not in kinds:
        lacks = " (config.json is missing)" if kind == "tokenizer" else ""
        raise UserError(f"{flag} {path} is a {kind} directory{lacks}; wanted: {' or '.join(kinds)}")
    return Checkpoint(path=path, kind=kind, manifest=manifest)


def _verify(path: Path, manifest: Manifest, flag: str, verify: str) -> None:
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{flag} {file} is missing, though {MANIFEST} lists it; publish the directory again")
        if (size := file.stat().st_size) != entry.size:
            raise UserError(f"{flag} {file} has {size} bytes instead of {entry.size}; publish the directory again")
    if manifest.iteration is None:  # a run directory holds further iterations
        for file in path.iterdir():
            if file.suffix in WEIGHTS and file.name not in manifest.files:
                raise UserError(f"{flag} {file} is not in {MANIFEST}: weights of unknown origin; move it away")
    if verify == "sizes":
        return
    names = [name for name in manifest.files if verify == "content" or not name.endswith(WEIGHTS)]
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
    """For each weights file that is read, a check of its content against the manifest, to be done while it is read.

    Each raises UserError; whoever reads must not publish before all are done.
    """
    if checkpoint.manifest is None:
        return []

    def check(path: Path, wanted: str) -> None:
        _check_hash(path, hash_file(path), wanted, flag)

    entries = {checkpoint.path / name: entry for name, entry in checkpoint.manifest.files.items()}
    return [partial(check, path, entries[path].hash) for path in sorted(sources) if path in entries]


def _foreign_kind(path: Path, flag: str, per_rank: Kind | None) -> Kind:
    if (path / RUN).exists():
        raise UserError(f"{flag} {path} is a run that has not saved an iteration yet; run its stage again")
    if (path / TRACKER).is_file():
        return _check_foreign_megatron(path, flag, per_rank)
    if rank_states(path):
        if per_rank != "hf":
            raise UserError(
                f"{flag} {path} has a file of SwissArmyTransformer for each rank; `convert to-megatron` reads it"
            )
        return "hf"
    if (path / "config.json").is_file():
        return _check_foreign_hf(path, flag)
    if (path / LAYERS).is_file():
        return "te"  # whose weights are checked when they are read
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
                f"{flag} {iteration} has a file for each rank, from before torch_dist; `convert to-hf --hf-files DIR` reads it"
            )
    elif not (iteration / ".metadata").is_file():
        raise UserError(f"{flag} {iteration}/.metadata is missing: not a whole torch_dist checkpoint")
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
