"""`sft prepare`: conversations to packed rows, with a loss on the assistant's tokens only.

A row holds whole conversations. `segments`: 1, 2, ... per conversation, 0 for padding. `labels`: the next token of the same
conversation if it is an assistant token, else -100.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.directory.publish import publish
from shared.cli import log, progress
from shared.data.chat_template import with_defaults
from shared.data.labels import IGNORE
from shared.data.sources import Piece, pieces
from shared.data.tokenizer import copy_tokenizer, set_chat_templates, tokenizer_hash
from shared.data.workers import ordered_map, usable_cores
from shared.errors import UserError
from shared.families import registry
from tools.sft.options import ReadingOptions
from tools.sft.packing import best_fit_decreasing
from tools.sft.reading import Reader, Reject, row_files

PIECE_BYTES = 4 << 20  # source bytes per work item
DEFAULT_SEQUENCE_LENGTH = 2048  # tokens, if there is no config.json with a context length
LARGEST_DEFAULT = 4096  # tokens: most conversations are shorter, and memory grows with the row length

REJECTS = "rejects.jsonl"

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
    ends: frozenset[int]  # ids of the tokens that end a trained turn
    notes: Counter[str]  # what was done to conversations -> how many
    rejects: tuple[Reject, ...]

    def first(self, count: int) -> Tokenised:
        """The first conversations only."""
        tokens = int(self.lengths[:count].sum())
        return replace(
            self,
            ids=self.ids[:tokens],
            assistant=self.assistant[:tokens],
            **{name: getattr(self, name)[:count] for name in ("lengths", "lines", "hashes")},
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation to pack."""

    ids: npt.NDArray[np.int32]
    assistant: npt.NDArray[np.bool_]
    hash: int


@dataclass
class Report:
    """Counts of conversations: read = packed + dropped. Rows that are set aside are not among them."""

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
    reading: ReadingOptions,
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
    sources = {"train": row_files(source, split=reading.split, flag="--source")}
    inputs: dict[str, Path | Sequence[Path]] = {"source": source, "tokenizer": tokenizer}
    if validation:
        sources["validation"] = row_files(validation, split=reading.split, flag="--validation")
        inputs["validation"] = validation
    if reading.chat_template:
        inputs["chat_template"] = reading.chat_template
    with publish(target, kind="dataset", inputs=inputs, overwrite=overwrite) as out:
        hf_files = open_checkpoint(tokenizer, kinds=("tokenizer", "hf", "megatron"), flag="--tokenizer").hf_files
        reader = Reader(hf_files, reading)
        opened = reader.tokenizer
        length = sequence_length or _default_length(hf_files)
        report = Report()
        tokenised = {name: _tokenise(files, hf_files, reading, workers, name) for name, files in sources.items()}
        every = [piece for several in tokenised.values() for piece in several]
        notes, ends = _notes(every), sorted(frozenset().union(*(piece.ends for piece in every)))
        rejected = _write_rejects(tokenised, out.path / REJECTS) if reading.on_error == "set-aside" else None
        samples = {name: _limit(several, length, overlong, report) for name, several in tokenised.items()}
        if validation_fraction:
            samples = _divide(samples["train"], validation_fraction)
        padding = opened.pad_token_id if opened.pad_token_id is not None else opened.eos_token_id
        splits = {name: _write(samples[name], length, padding, out.path / name) for name in samples}
        duplicates = _duplicates(samples)
        copy_tokenizer(hf_files, out.path / "tokenizer")
        _publish_template(reader, out.path / "tokenizer")
        further = {} if rejected is None else {"set_aside": rejected}
        out.describe(
            format="packed",
            seq_length=length,
            splits=splits,
            vocab_size=len(opened),
            eos_token_id=opened.eos_token_id,
            pad_token_id=padding,
            tokenizer_hash=tokenizer_hash(out.path / "tokenizer"),
            assistant_spans=reader.renderer.method,
            turn_end_token_ids=ends,
            template_arguments=reader.arguments,
            conversations=vars(report) | further,
            notes=dict(notes),
            validation_conversations_in_train=duplicates,
        )
        facts = out.facts
    print(json.dumps({"target": str(target), **facts}))


def _publish_template(reader: Reader, tokenizer: Path) -> None:
    """Replace the tokenizer's chat template by the one that was used, with the values of its variables as defaults."""
    template = reader.tokenizer.chat_template
    if reader.arguments:
        if isinstance(template, dict):
            log(
                "--template-argument: give it wherever the model is used; the named chat templates are published unchanged"
            )
            return
        template = with_defaults(template, reader.arguments)
        log("--template-argument: the values are defaults of the chat template that is published")
    elif reader.chat_template is None:
        return
    set_chat_templates(tokenizer, {"default": template})


def _default_length(hf_files: Path) -> int:
    config = hf_files / "config.json"
    said = registry.language_config(json.loads(config.read_text(encoding="utf-8"))) if config.is_file() else {}
    known = said.get("max_position_embeddings")
    length = min(known, LARGEST_DEFAULT) if known else DEFAULT_SEQUENCE_LENGTH
    log(f"--sequence-length {length} " + (f"(the model takes {known})" if known else "(no config.json says better)"))
    return length


def _tokenise(files: list[Path], hf_files: Path, reading: ReadingOptions, workers: int, split: str) -> list[Tokenised]:
    every = [piece for file in files for piece in pieces(file, PIECE_BYTES)]
    processes = min(workers or usable_cores(), len(every))
    left = reading.limit if split == "train" else None
    done: list[Tokenised] = []
    with progress(sum(p.end - p.start for p in every), "bytes", f"tokenising {split}") as advance:
        results = ordered_map(_read, every, workers=processes, setup=_set_up, setup_arguments=(hf_files, reading))
        with contextlib.closing(results):
            for piece, tokenised in zip(every, results, strict=False):
                done.append(tokenised if left is None else tokenised.first(left))
                advance(piece.end - piece.start)
                if left is not None and (left := left - len(tokenised.lengths)) <= 0:
                    break
    return done


_worker: dict[str, Any] = {}  # state of this worker process, filled by `_set_up`


def _set_up(hf_files: Path, reading: ReadingOptions) -> None:
    _worker.update(reader=Reader(hf_files, reading))


def _read(piece: Piece) -> Tokenised:
    ids, assistant, lines, hashes = [], [], [], []
    ends: set[int] = set()
    notes: Counter[str] = Counter()
    rejects = []
    for read in _worker["reader"].read(piece):
        if isinstance(read, Reject):
            rejects.append(read)
            continue
        conversed, tokens = read.conversation, read.tokens
        ids.append(tokens.ids)
        assistant.append(tokens.assistant)
        ends |= tokens.ends
        notes.update(tokens.notes)
        lines.append(read.row.line)
        plain = json.dumps([conversed.messages, conversed.tools], ensure_ascii=False, sort_keys=True)
        hashes.append(xxhash.xxh3_64_intdigest(plain.encode("utf-8", "surrogatepass")))
    return Tokenised(
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        assistant=np.concatenate(assistant) if assistant else np.zeros(0, bool),
        lengths=np.array([len(x) for x in ids], np.int64),
        lines=np.array(lines, np.int64),
        hashes=np.array(hashes, np.uint64),
        path=piece.path,
        ends=frozenset(ends),
        notes=notes,
        rejects=tuple(rejects),
    )


def _notes(every: list[Tokenised]) -> Counter[str]:
    """What was done to conversations, announced with how many."""
    notes: Counter[str] = sum((piece.notes for piece in every), Counter())
    for note, count in notes.items():
        log(f"{count} conversation{'s' * (count > 1)}: {note}")
    return notes


def _write_rejects(tokenised: dict[str, list[Tokenised]], path: Path) -> int:
    """Write the rows that were set aside, with their reasons. Returns their number."""
    rejects = [(split, reject) for split, several in tokenised.items() for piece in several for reject in piece.rejects]
    if rejects:
        with path.open("w", encoding="utf-8") as file:
            for split, reject in rejects:
                entry = {"file": str(reject.path), "line": reject.line, "split": split, "reason": reject.reason}
                file.write(json.dumps(entry | {"row": reject.row}, default=str) + "\n")
        log(f"{len(rejects)} rows are set aside in {path.name}; the first: {rejects[0][1].reason}")
    return len(rejects)


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
