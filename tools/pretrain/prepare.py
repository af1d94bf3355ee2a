"""`pretrain prepare`: text to a Megatron indexed dataset. Worker processes tokenise parts; parts are merged in source order.

Finished parts stay in `TARGET.work` until the dataset is published; an interrupted run resumes from them. The folder has no
manifest, so no command accepts it as a dataset.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.directory.publish import publish
from shared.checkpoint.directory.target import lock
from shared.checkpoint.files import remove_tree
from shared.cli import log, progress
from shared.data.document_tokens import DocumentTokens
from shared.data.indexed import IndexedWriter, token_dtype
from shared.data.parts import FinishedPart, Recipe, init_worker, plan, tokenize_part
from shared.data.sources import expand
from shared.data.tokenizer import copy_tokenizer, open_tokenizer, tokenizer_hash
from shared.data.workers import ordered_map, usable_cores
from shared.errors import AlreadyDone, UserError

WORK = ".work"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Size of a split."""

    tokens: int
    """Tokens, including those that begin and end each document."""
    documents: int
    utf8_bytes: int
    """UTF-8 size of the text, for bits per byte."""


def run(
    *,
    source: tuple[Path, ...],
    tokenizer: Path,
    target: Path,
    validation: tuple[Path, ...] | None,
    validation_fraction: float,
    text_key: str,
    end_of_document: str | None,
    bos: bool | None,
    workers: int,
    overwrite: bool,
) -> None:
    """Tokenise the sources and publish the dataset.

    Raises:
        UserError: a source is unreadable (with file and line), a split is empty, or the target exists.
    """
    if validation and validation_fraction:
        raise UserError("give --validation or --validation-fraction, not both")
    sources = {"train": expand(source, flag="--source")}
    inputs: dict[str, Path | Sequence[Path]] = {"source": source, "tokenizer": tokenizer}
    if validation:
        sources["validation"] = expand(validation, flag="--validation")
        inputs["validation"] = validation
        if both := {f.resolve() for f in sources["train"]} & {f.resolve() for f in sources["validation"]}:
            raise UserError(f"--validation {min(both)}: this file is also in --source")
    work = target.with_name(target.name + WORK)
    try:
        with publish(target, kind="dataset", inputs=inputs, overwrite=overwrite) as out:
            hf_files = open_checkpoint(tokenizer, kinds=("tokenizer", "hf", "megatron"), flag="--tokenizer").hf_files
            recipe, ends = _recipe(hf_files, text_key, end_of_document, bos)
            log(str(ends))
            held = _open_work(work)
            try:
                finished = _tokenise(sources, recipe, work, workers)
                splits, duplicates = _merge(finished, recipe, validation_fraction, out.path)
            except UserError:
                _drop_if_empty(work)
                raise
            finally:
                os.close(held)
            copy_tokenizer(hf_files, out.path / "tokenizer")
            out.describe(
                format="indexed",
                splits={name: asdict(split) for name, split in splits.items()},
                vocab_size=recipe.vocab_size,
                eos_token_id=recipe.eos_token_id,
                end_of_document=ends.end,
                begin_of_document=ends.begin,
                dtype=token_dtype(recipe.vocab_size).name,
                tokenizer_hash=tokenizer_hash(hf_files),
                source_hash=_source_hash(finished),
                empty_documents=sum(part.empty for parts in finished.values() for part in parts),
                validation_documents_in_train=duplicates,
            )
            facts = out.facts
    except AlreadyDone:
        if work.is_dir():  # killed between publishing and clean-up
            remove_tree(work)
        raise
    remove_tree(work)
    print(json.dumps({"target": str(target), **facts}))


def _recipe(
    hf_files: Path, text_key: str, end_of_document: str | None, bos: bool | None
) -> tuple[Recipe, DocumentTokens]:
    tokenizer = open_tokenizer(hf_files, needs_eos=False)
    ends = DocumentTokens.of(tokenizer, end_of_document, bos)
    recipe = Recipe(
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        eos_token_id=ends.end_id,
        bos_token_id=ends.begin_id,
        vocab_size=len(tokenizer),
        text_key=text_key,
    )
    return recipe, ends


def _open_work(work: Path) -> int:
    """Create or reopen the folder of parts, and lock it."""
    work.mkdir(exist_ok=True)
    held = lock(work)
    if held is None:
        raise UserError(f"--target: another process is preparing into {work}; wait for it or stop it")
    for left in work.glob("*.new-*"):
        left.unlink()
    return held


def _drop_if_empty(work: Path) -> None:
    """Remove the folder if it has no finished parts."""
    if not any(work.iterdir()):
        work.rmdir()
    else:
        log(f"finished parts are kept in {work} for the next run")


def _tokenise(
    sources: dict[str, list[Path]], recipe: Recipe, work: Path, workers: int
) -> dict[str, list[FinishedPart]]:
    """Every part of every source, in source order."""
    plans = {name: plan(files) for name, files in sources.items()}
    every = [part for parts in plans.values() for part in parts]
    processes = min(workers or usable_cores(), len(every))
    finished: list[FinishedPart] = []
    with progress(sum(part.source_bytes for part in every), "bytes", "tokenising") as advance:
        for done in ordered_map(
            tokenize_part, every, workers=processes, setup=init_worker, setup_arguments=(recipe, work)
        ):
            finished.append(done)
            advance(done.source_bytes)
    if reused := sum(part.reused for part in finished):
        log(f"{reused} of {len(finished)} parts were finished by an earlier run")
    rest = iter(finished)
    return {name: [next(rest) for _ in parts] for name, parts in plans.items()}


def _merge(
    finished: dict[str, list[FinishedPart]], recipe: Recipe, fraction: float, folder: Path
) -> tuple[dict[str, Split], int]:
    """Write the splits. Returns them and the number of validation documents whose exact text is also in train."""
    splits: dict[str, Split] = {}
    hashes: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
    if fraction or "validation" in finished:
        parts = finished.get("validation") or finished["train"]
        selection = SplitFilter(fraction=fraction if "validation" not in finished else 1.0, validation=True)
        splits["validation"], hashes = _write(parts, selection, recipe, folder / "validation")
        if not splits["validation"].documents:
            given = f"--validation-fraction {fraction} leaves" if fraction else "--validation has"
            raise UserError(f"{given} no document for validation; give more text or a larger share")
    selection = SplitFilter(fraction=fraction if "validation" not in finished else 0.0, validation=False)
    splits["train"], train_hashes = _write(finished["train"], selection, recipe, folder / "train")
    if not splits["train"].documents:
        raise UserError("--source has no text for training: every document is empty or went to validation")
    duplicates = int(np.isin(hashes, train_hashes).sum())
    if duplicates:
        log(f"{duplicates} of {len(hashes)} validation documents are in the training text word for word")
    return splits, duplicates


@dataclass(frozen=True, kw_only=True)
class SplitFilter:
    """Selects a split's documents by the hash of their text: equal texts are in the same split."""

    fraction: float
    """Share of validation documents."""
    validation: bool

    def mask(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Mask of the split's documents: `[documents]`."""
        # Upper 53 bits as a number in [0, 1), exact in float64.
        chosen = (hashes >> np.uint64(11)).astype(np.float64) / 2**53 < self.fraction
        return chosen if self.validation else ~chosen


def _write(
    parts: list[FinishedPart], selection: SplitFilter, recipe: Recipe, prefix: Path
) -> tuple[Split, npt.NDArray[np.uint64]]:
    dtype = token_dtype(recipe.vocab_size)
    hashes: list[npt.NDArray[np.uint64]] = []
    utf8_bytes = 0
    with IndexedWriter(prefix, dtype) as writer:
        for part in parts:
            documents = part.documents()
            mask = selection.mask(documents["hash"])
            for tokens in _chosen(part.tokens(dtype), documents["tokens"], mask):
                writer.add(*tokens)
            hashes.append(documents["hash"][mask])
            utf8_bytes += int(documents["bytes"][mask].sum())
    split = Split(tokens=writer.tokens, documents=writer.documents, utf8_bytes=utf8_bytes)
    return split, np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)


def _chosen(
    tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_]
) -> Iterator[tuple[npt.NDArray[np.integer], npt.NDArray[np.int32]]]:
    """Token ids and lengths of the selected documents; a fully selected part is one piece."""
    if mask.any():
        ids = tokens if mask.all() else tokens[np.repeat(mask, lengths)]
        yield ids, lengths[mask]


def _source_hash(finished: dict[str, list[FinishedPart]]) -> str:
    digest = xxhash.xxh3_128()
    for name, parts in finished.items():
        digest.update(name.encode())
        for part in parts:
            digest.update(part.name.encode())
    return f"xxh3_128:{digest.hexdigest()}"
