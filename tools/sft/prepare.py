"""`sft prepare`: conversations to packed rows, with a loss on the assistant's tokens only.

A row holds whole conversations. `segments`: 1, 2, ... per conversation, 0 for padding. `labels`: the next token of the same
conversation if it is an assistant token, else -100.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.directory.publish import publish
from shared.cli import log, progress
from shared.data.labels import IGNORE
from shared.data.sources import Piece, expand, is_rows, pieces, rows
from shared.data.tokenizer import copy_tokenizer, open_tokenizer, tokenizer_hash
from shared.data.workers import ordered_map, usable_cores
from shared.errors import UserError
from shared.families import registry
from tools.sft.conversations import Conversation, Format, conversation
from tools.sft.packing import best_fit_decreasing
from tools.sft.spans import Renderer

PIECE_BYTES = 4 << 20  # source bytes per work item
DEFAULT_SEQUENCE_LENGTH = 2048  # tokens, if there is no config.json with a context length
LARGEST_DEFAULT = 4096  # tokens: most conversations are shorter, and memory grows with the row length

Overlong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """The conversations of a piece, concatenated."""

    ids: npt.NDArray[np.int32]  # [tokens]
    assistant: npt.NDArray[np.bool_]  # [tokens]
    lengths: npt.NDArray[np.int64]  # [conversations]
    lines: npt.NDArray[np.int64]  # [conversations], line in the file
    hashes: npt.NDArray[np.uint64]  # [conversations], of the messages
    path: Path


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation to pack."""

    ids: npt.NDArray[np.int32]
    assistant: npt.NDArray[np.bool_]
    hash: int


@dataclass
class Report:
    """Counts of conversations: read = packed + dropped."""

    read: int = 0
    packed: int = 0
    truncated: int = 0
    dropped_overlong: int = 0
    dropped_without_target: int = 0
    """No assistant tokens are left after truncation."""


def run(
    *,
    source: tuple[Path, ...],
    tokenizer: Path,
    target: Path,
    sequence_length: int | None,
    validation: tuple[Path, ...] | None,
    validation_fraction: float,
    form: Format,
    overlong: Overlong,
    workers: int,
    overwrite: bool,
) -> None:
    """Pack the conversations and publish the dataset.

    Raises:
        UserError: a row cannot be read or rendered (with file and line), a conversation is too long with
            `overlong="error"`, a split is empty, or the target exists.
    """
    if validation and validation_fraction:
        raise UserError("give --validation or --validation-fraction, not both")
    sources = {"train": _files(source, "--source")}
    inputs: dict[str, Path | Sequence[Path]] = {"source": source, "tokenizer": tokenizer}
    if validation:
        sources["validation"] = _files(validation, "--validation")
        inputs["validation"] = validation
    with publish(target, kind="dataset", inputs=inputs, overwrite=overwrite) as out:
        hf_files = open_checkpoint(tokenizer, kinds=("tokenizer", "hf", "megatron"), flag="--tokenizer").hf_files
        opened = open_tokenizer(hf_files)
        length = sequence_length or _default_length(hf_files)
        renderer = Renderer(opened)
        report = Report()
        samples = {
            name: _limit(_tokenise(files, hf_files, form, workers, name), length, overlong, report)
            for name, files in sources.items()
        }
        if validation_fraction:
            samples = _divide(samples["train"], validation_fraction)
        padding = opened.pad_token_id if opened.pad_token_id is not None else opened.eos_token_id
        splits = {name: _write(samples[name], length, padding, out.path / name) for name in samples}
        duplicates = _duplicates(samples)
        copy_tokenizer(hf_files, out.path / "tokenizer")
        out.describe(
            format="packed",
            seq_length=length,
            splits=splits,
            vocab_size=len(opened),
            eos_token_id=opened.eos_token_id,
            pad_token_id=padding,
            tokenizer_hash=tokenizer_hash(hf_files),
            assistant_spans="generation marks" if renderer.marked else "rendered prefixes",
            conversations=vars(report),
            validation_conversations_in_train=duplicates,
        )
        facts = out.facts
    print(json.dumps({"target": str(target), **facts}))


def _files(paths: tuple[Path, ...], flag: str) -> list[Path]:
    files = expand(paths, flag=flag)
    for file in files:
        if not is_rows(file) and ".json" not in file.suffixes:
            raise UserError(f"{flag} {file}: conversations are JSON lines (.jsonl, also .gz, .zst), .json or .parquet")
    return files


def _default_length(hf_files: Path) -> int:
    config = hf_files / "config.json"
    said = registry.language_config(json.loads(config.read_text(encoding="utf-8"))) if config.is_file() else {}
    known = said.get("max_position_embeddings")
    length = min(known, LARGEST_DEFAULT) if known else DEFAULT_SEQUENCE_LENGTH
    log(f"--sequence-length {length} " + (f"(the model takes {known})" if known else "(no config.json says better)"))
    return length


def _tokenise(files: list[Path], hf_files: Path, form: Format, workers: int, split: str) -> list[Tokenised]:
    every = [piece for file in files for piece in pieces(file, PIECE_BYTES)]
    processes = min(workers or usable_cores(), len(every))
    done: list[Tokenised] = []
    with progress(sum(p.end - p.start for p in every), "bytes", f"tokenising {split}") as advance:
        results = ordered_map(_read, every, workers=processes, setup=_set_up, setup_arguments=(hf_files, form))
        for piece, tokenised in zip(every, results, strict=True):
            done.append(tokenised)
            advance(piece.end - piece.start)
    return done


_worker: dict[str, Any] = {}  # state of this worker process, filled by `_set_up`


def _set_up(hf_files: Path, form: Format) -> None:
    _worker.update(renderer=Renderer(open_tokenizer(hf_files)), form=form)


def _read(piece: Piece) -> Tokenised:
    ids, assistant, lines, hashes = [], [], [], []
    for row in rows(piece):
        conversed: Conversation = conversation(row, _worker["form"])
        try:
            tokens = _worker["renderer"].tokens(conversed)
        except ValueError as error:
            raise row.error(str(error)) from error
        if not tokens.assistant.any():
            raise row.error("the chat template marks no assistant tokens; check its {% generation %} blocks")
        ids.append(tokens.ids)
        assistant.append(tokens.assistant)
        lines.append(row.line)
        plain = json.dumps([conversed.messages, conversed.tools], ensure_ascii=False, sort_keys=True)
        hashes.append(xxhash.xxh3_64_intdigest(plain.encode("utf-8", "surrogatepass")))
    return Tokenised(
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        assistant=np.concatenate(assistant) if assistant else np.zeros(0, bool),
        lengths=np.array([len(x) for x in ids], np.int64),
        lines=np.array(lines, np.int64),
        hashes=np.array(hashes, np.uint64),
        path=piece.path,
    )


def _limit(read: list[Tokenised], length: int, overlong: Overlong, report: Report) -> list[Sample]:
    """Conversations of at most `length` tokens; longer ones are an error, dropped or truncated, as `overlong` says."""
    samples = []
    for piece in read:
        ends = np.cumsum(piece.lengths)
        for start, end, line, digest in zip(ends - piece.lengths, ends, piece.lines, piece.hashes, strict=True):
            report.read += 1
            if end - start > length:
                if overlong == "error":
                    raise UserError(
                        f"{piece.path}:{line}: {end - start} tokens, more than --sequence-length {length}; "
                        "raise it, or choose --overlong drop or --overlong truncate"
                    )
                if overlong == "drop":
                    report.dropped_overlong += 1
                    continue
            assistant = piece.assistant[start : min(end, start + length)]
            if not assistant[1:].any():  # the first token is never a label
                report.dropped_without_target += 1
                continue
            report.truncated += int(end - start > length)
            report.packed += 1
            samples.append(Sample(ids=piece.ids[start : start + len(assistant)], assistant=assistant, hash=int(digest)))
    return samples


def _divide(samples: list[Sample], fraction: float) -> dict[str, list[Sample]]:
    """Split by the hash of the messages: equal conversations are in the same split."""
    limit = int(fraction * 2**64)
    return {
        "train": [sample for sample in samples if sample.hash >= limit],
        "validation": [sample for sample in samples if sample.hash < limit],
    }


def _duplicates(samples: dict[str, list[Sample]]) -> int:
    train = {sample.hash for sample in samples["train"]}
    count = sum(sample.hash in train for sample in samples.get("validation", []))
    if count:
        log(f"{count} validation conversations are in the training data word for word")
    return count


def _write(samples: list[Sample], length: int, padding: int, prefix: Path) -> dict[str, int]:
    """Write `PREFIX.{tokens,labels,segments}.npy`, int32 `[rows, length]`. Returns the split's entry in the manifest."""
    if not samples:
        raise UserError(
            f"no conversation is left for the {prefix.name} split; give more, or a longer --sequence-length"
        )
    packed = best_fit_decreasing([len(sample.ids) for sample in samples], length)
    shape = (len(packed), length)
    tokens, labels, segments = (
        np.lib.format.open_memmap(Path(f"{prefix}.{name}.npy"), mode="w+", dtype=np.int32, shape=shape)
        for name in ("tokens", "labels", "segments")
    )
    tokens[:] = padding
    labels[:] = IGNORE
    for row, members in enumerate(packed):
        start = 0
        for number, index in enumerate(members, start=1):
            sample = samples[index]
            end = start + len(sample.ids)
            tokens[row, start:end] = sample.ids
            segments[row, start:end] = number
            labels[row, start : end - 1] = np.where(sample.assistant[1:], sample.ids[1:], IGNORE)
            start = end
    for array in (tokens, labels, segments):
        array.flush()
    return {
        "sequences": len(packed),
        "tokens": sum(len(sample.ids) for sample in samples),
        "target_tokens": sum(int(sample.assistant[1:].sum()) for sample in samples),
        "conversations": len(samples),
    }
