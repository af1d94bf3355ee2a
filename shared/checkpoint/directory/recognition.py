"""What a directory of another program is: its kind and which of its weights are read, or why it is not read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.checkpoint.directory.auxiliary_files import unread_weights
from shared.checkpoint.directory.manifest import MANIFEST, Kind
from shared.checkpoint.directory.target import RUN
from shared.checkpoint.formats.hugging_face import choose_weights, holds_weights
from shared.checkpoint.formats.megatron_lm_ranks import rank_files
from shared.checkpoint.formats.swiss_army_transformer import rank_states
from shared.checkpoint.formats.transformer_engine_reader import LAYERS
from shared.errors import UserError
from shared.foreign_formats import foreign_format

TRACKER = "latest_checkpointed_iteration.txt"
_CONFIG = "config.json"
_ITERATION = re.compile(r"release|iter_\d{7}")


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """A directory of another program."""

    kind: Kind
    weights: tuple[str, ...] = ()  # of kind hf: the files that are read, relative
    rank_files: tuple[Path, ...] = ()  # of SwissArmyTransformer
    ignored: tuple[str, ...] = ()  # other weights beside them


def iteration_name(iteration: int) -> str:
    """`iter_0000100`, as in Megatron-LM."""
    return f"iter_{iteration:07d}"


def tracked_iteration(directory: Path) -> str:
    """The iteration folder in Megatron's tracker file."""
    text = (directory / TRACKER).read_text(encoding="utf-8").strip()
    return text if text == "release" else iteration_name(int(text))


def recognize(path: Path, *, kinds: Sequence[Kind], flag: str, per_rank: Kind | None) -> Recognition:
    """The kind of a directory without a manifest.

    A config.json beside weights makes it a Hugging Face directory, whatever a trainer left there; a Megatron checkpoint
    there is read where only that is wanted.

    Args:
        path: the directory.
        kinds: accepted kinds. With "tokenizer" its weights are not read, and may be missing.
        flag: its flag, for messages.
        per_rank: as in `open_checkpoint`.

    Raises:
        UserError: it is of no kind, or incomplete.
    """
    configured, tracked = (path / _CONFIG).is_file(), (path / TRACKER).is_file()
    megatron = tracked and "megatron" in kinds and "hf" not in kinds
    if configured and "tokenizer" in kinds:
        return Recognition(kind="hf")
    if configured and holds_weights(path) and not megatron:
        chosen = choose_weights(path, flag)
        used = {*chosen.files, *([chosen.index] if chosen.index else [])}
        return Recognition(kind="hf", weights=chosen.files, ignored=tuple(unread_weights(path, used)))
    if tracked:
        _check_megatron(path, flag, per_rank)
        return Recognition(kind="megatron")
    if (path / RUN).exists():
        raise UserError(f"{flag} {path} is a training run that has not saved an iteration yet; run its command again")
    if ranks := rank_states(path):
        if per_rank != "hf":
            raise UserError(
                f"{flag} {path} is a SwissArmyTransformer checkpoint, one file per rank; `convert to-megatron` reads it"
            )
        used = {file.relative_to(path).as_posix() for file in ranks}
        return Recognition(kind="hf", rank_files=tuple(ranks), ignored=tuple(unread_weights(path, used)))
    if (path / LAYERS).is_file():
        return Recognition(kind="te")  # its weights are checked on reading
    reason = _unreadable(path)
    if (path / "tokenizer.json").is_file() and not configured and (reason is None or "tokenizer" in kinds):
        return Recognition(kind="tokenizer")
    if reason is None and configured:
        reason = f"has a {_CONFIG} and no weights; fetch the model again"
    raise UserError(f"{flag} {path} {reason or f'holds no checkpoint: neither {MANIFEST}, {_CONFIG} nor {TRACKER}'}")


def _check_megatron(path: Path, flag: str, per_rank: Kind | None) -> None:
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


def _unreadable(path: Path) -> str | None:
    """What a directory is that no command reads, with the fix; None if nothing in it says so."""
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return "is empty; fetch the checkpoint again"
    if "snapshots" in names and {"blobs", "refs"} & {*names}:
        return f"is a model's folder in the Hugging Face cache; give its snapshot, {_snapshot(path)}"
    if models := [name for name in names if name.startswith("models--")]:
        return f"is the Hugging Face cache; give the snapshot of one model, as {_snapshot(path / models[0])}"
    if _is_iteration(path, names):
        return f"is one iteration of a Megatron checkpoint; give the directory above it, {_named_iteration(path)}"
    if found := foreign_format(names):
        kind, name = found
        return f"holds {name}: {kind.title}, which is not read; {kind.fix}"
    inner = [name for name in names if _is_checkpoint(path / name)]
    if inner:
        newest = max(inner, key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name))
        others = f" (or another of {len(inner)})" if len(inner) > 1 else ""
        return f"holds no checkpoint itself; give {path / newest}{others}"
    return None


def _snapshot(model: Path) -> str:
    """A model's snapshot in the cache: that of `main`, or the last by name."""
    main = model / "refs" / "main"
    if main.is_file() and (model / "snapshots" / (revision := main.read_text(encoding="utf-8").strip())).is_dir():
        return str(model / "snapshots" / revision)
    below = model / "snapshots"
    there = sorted(entry.name for entry in below.iterdir()) if below.is_dir() else []
    return str(below / (there[-1] if there else "REVISION"))


def _is_iteration(path: Path, names: Sequence[str]) -> bool:
    if rank_files(path):
        return True
    named = is_iteration_folder(path) or (path.resolve().parent / TRACKER).is_file()
    return ".metadata" in names and (named or "common.pt" in names)


def _named_iteration(path: Path) -> str:
    """The directory above an iteration, and what its tracker file must say."""
    above = directory_above(path)
    name = path.resolve().name
    try:
        if tracked_iteration(above) == name:
            return str(above)
    except (ValueError, OSError):
        pass
    number = name.removeprefix("iter_").lstrip("0") or "0"
    return f"{above}, with {number} in {above / TRACKER}"


def is_iteration_folder(path: Path) -> bool:
    """Whether a directory is named as an iteration of Megatron-LM."""
    return bool(_ITERATION.fullmatch(path.resolve().name))


def directory_above(path: Path) -> Path:
    """The parent, spelt as the path was."""
    return path.parent if path.name not in ("", "..") else path / ".."


def _is_checkpoint(path: Path) -> bool:
    return any((path / name).is_file() for name in (MANIFEST, _CONFIG, TRACKER))
