"""`pretrain prepare`: text to a Megatron indexed dataset. Worker processes tokenise parts; parts are merged in source order.

Finished parts stay in `TARGET.work` until the dataset is published; an interrupted run resumes from them. The folder has no
manifest, so no command accepts it as a dataset. Shards (`--shard`) write into the same folder; the one that finds all parts
finished joins them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import xxhash

from shared.checkpoint.directory.manifest import Inputs, Parent, parents_of, run_fingerprint
from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.directory.publish import publish
from shared.checkpoint.directory.sharded_publish import ShardSpec
from shared.checkpoint.directory.target import check_overlap, check_target
from shared.checkpoint.files import remove_tree
from shared.cli import log, progress
from shared.data.document_tokens import DocumentTokens
from shared.data.documents import documents
from shared.data.indexed import token_dtype
from shared.data.parts import (
    BATCH_CHARACTERS,
    FinishedPart,
    Part,
    Recipe,
    compare_texts,
    init_worker,
    plan,
    tokenize_part,
)
from shared.data.sources import expand
from shared.data.stretches import cut_of
from shared.data.tokenizer import copy_tokenizer, open_tokenizer, tokenizer_hash
from shared.data.tokenizer_backends import (
    FAST,
    REFERENCE,
    SAMPLED,
    Choice,
    beginning,
    choice_without_comparing,
    verdict,
    warm_up,
)
from shared.data.workers import Workers, ordered_map, usable_cores
from shared.errors import AlreadyDone, UserError
from shared.invocation import invocation
from tools.pretrain.merge import Deduplicate, Parts, merge
from tools.pretrain.work_folder import WORK, Ledger, drop_if_empty, joining, open_work


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
    deduplicate: Deduplicate | None = None,
    tokenizer_backend: Literal["auto", "tokenizers"] = "auto",
    workers: int,
    shard: str | None = None,
    overwrite: bool,
) -> None:
    """Tokenise the sources and publish the dataset.

    Raises:
        UserError: a source is unreadable (with file and line), a split is empty, or the target exists.
    """
    spec = ShardSpec.parse(shard) if shard else None
    if validation and validation_fraction:
        raise UserError("give --validation or --validation-fraction, not both")
    sources = {"train": expand(source, flag="--source")}
    inputs: dict[str, Path | Sequence[Path]] = {"source": source, "tokenizer": tokenizer}
    if validation:
        sources["validation"] = expand(validation, flag="--validation")
        inputs["validation"] = validation
        if both := {f.resolve() for f in sources["train"]} & {f.resolve() for f in sources["validation"]}:
            raise UserError(f"--validation {min(both)}: this file is also in --source")
    work, held = target.with_name(target.name + WORK), None
    try:
        parents = _check(target, inputs, overwrite)
        hf_files = open_checkpoint(tokenizer, kinds=("tokenizer", "hf", "megatron"), flag="--tokenizer").hf_files
        plans = {name: plan(files) for name, files in sources.items()}
        every = [part for parts in plans.values() for part in parts]
        own = [index for index in range(len(every)) if spec is None or index % spec.count + 1 == spec.index]
        known = choice_without_comparing(tokenizer_backend, sum(part.source_bytes for part in every))
        try:
            with _workers(workers or usable_cores(), len(own), known, hf_files) as processes:
                recipe, ends = _open_recipe(hf_files, text_key, end_of_document, bos)
                log(str(ends))
                target.parent.mkdir(parents=True, exist_ok=True)
                held = open_work(work, shard=spec is not None)
                recipe = replace(recipe, signatures=deduplicate == "minhash")
                choice, done = _begin(processes, known, recipe, every, own, work)
                log(str(choice))
                recipe = replace(recipe, backend=choice.name)
                ledger = Ledger(work, every, recipe, run_fingerprint(invocation(), inputs, parents))
                _finish(every, own, done, ledger)
            if (finished := _all_finished(ledger, plans, spec, target)) is None:
                return
            with joining(work) as alone:
                if not alone:
                    log("all parts are finished; another shard joins them")
                    return
                facts = _publish(
                    target,
                    inputs,
                    parents,
                    overwrite,
                    hf_files,
                    recipe,
                    ends,
                    choice,
                    finished,
                    validation_fraction,
                    deduplicate,
                )
        except UserError:
            if held is not None and work.is_dir():
                drop_if_empty(work, held)
            raise
        finally:
            if held is not None:
                os.close(held)
    except AlreadyDone:
        if work.is_dir():  # killed between publishing and clean-up
            remove_tree(work)
        raise
    remove_tree(work)
    print(json.dumps({"target": str(target), **facts}))


def _check(target: Path, inputs: Inputs, overwrite: bool) -> list[Parent]:
    """Check the target before any work, also where only the last shard publishes. Returns what the inputs are."""
    check_overlap(target, inputs)
    parents = parents_of(inputs)
    fingerprint = run_fingerprint(invocation(), inputs, parents)
    check_target(target, fingerprint=fingerprint, parents=parents, overwrite=overwrite)
    return parents


def _workers(count: int, parts: int, known: Choice | None, hf_files: Path) -> Workers:
    """The processes, which start and open the tokenizer while `_open_recipe` does in another."""
    if known is not None:
        count = min(count, parts)
    file, names = hf_files / "tokenizer.json", (REFERENCE,) if known else (FAST, REFERENCE)
    return Workers(count, warm_up, file, names) if file.is_file() else Workers(count)


def _open_recipe(*given: Any) -> tuple[Recipe, DocumentTokens]:
    """`_recipe`, in a process that ends with it and that has no torch: transformers would import it, which takes seconds of a
    core and half a GiB, and tokenizers need none of it.
    """
    if "torch" in sys.modules:
        return _recipe(*given)
    return next(ordered_map(_recipe_of, [given], workers=1, setup=_without_torch, apart=True))


def _recipe_of(given: tuple[Any, ...]) -> tuple[Recipe, DocumentTokens]:
    return _recipe(*given)


def _without_torch() -> None:
    """Have this process find no torch. transformers says so in a warning, which is not for the user."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]


def _recipe(
    hf_files: Path, text_key: str, end_of_document: str | None, bos: bool | None
) -> tuple[Recipe, DocumentTokens]:
    tokenizer = open_tokenizer(hf_files, needs_eos=False)
    ends = DocumentTokens.of(tokenizer, end_of_document, bos)
    backend = tokenizer.backend_tokenizer
    recipe = Recipe(
        tokenizer_json=backend.to_str(),
        eos_token_id=ends.end_id,
        bos_token_id=ends.begin_id,
        vocab_size=len(tokenizer),
        text_key=text_key,
        cut=cut_of(backend),
    )
    return recipe, ends


def _begin(
    processes: Workers, known: Choice | None, recipe: Recipe, every: list[Part], own: list[int], work: Path
) -> tuple[Choice, Generator[FinishedPart]]:
    """The back end, compared on the beginning of the text, and the finished parts of this process, in order.

    What is compared goes first, and the parts behind it, by the fast back end: no core waits for the last comparison. If ids
    differ, those parts are left, and begun again by the other; their names end with the back end's.
    """

    def texts() -> Iterator[str]:
        for part in every:
            for piece in part.pieces:
                for _, several in documents(piece, recipe.text_key, recipe.cut, BATCH_CHARACTERS):
                    yield from several

    if known is None:
        processes.set_up(init_worker, replace(recipe, backend=FAST), work)
        batches = list(beginning(texts()))
        compared = processes.map(compare_texts, batches, ahead=len(batches))
        done = processes.map(tokenize_part, (every[index] for index in own))
        choice = verdict(compared)
        if choice.name == FAST:
            return choice, done
        compared.close()
        done.close()
        known = choice
    processes.set_up(init_worker, replace(recipe, backend=REFERENCE), work)
    return known, processes.map(tokenize_part, (every[index] for index in own))


def _finish(every: list[Part], own: list[int], done: Generator[FinishedPart], ledger: Ledger) -> None:
    """Tokenise the parts of this process: all, or those of the shard."""
    reused = 0
    with progress(sum(every[index].source_bytes for index in own), "bytes", "tokenising") as advance:
        for index, part in zip(own, done, strict=True):
            ledger.record(index, part)
            reused += part.reused
            advance(part.source_bytes)
    if reused:
        log(f"{reused} of {len(own)} parts were finished by an earlier run")


def _all_finished(ledger: Ledger, plans: dict[str, list[Part]], shard: ShardSpec | None, target: Path) -> Parts | None:
    """Every part by its flag; None where other shards have parts to finish."""
    finished = ledger.finished()
    missing = [index for index, part in enumerate(finished) if part is None]
    if missing and shard is None:
        raise UserError("--source: a file has changed while it was read; run this again when nobody writes to it")
    if missing and shard is not None and shard.index is None:
        raise UserError(
            f"--shard publish/{shard.count}: {len(missing)} of {len(finished)} parts are not finished, or their sources have "
            "changed since; run the shards again"
        )
    if missing:
        assert shard is not None
        log(
            f"shard {shard.index} of {shard.count} is written; {len(missing)} of {len(finished)} parts are left to other "
            "shards, and the last one joins them"
        )
        print(
            json.dumps({"target": str(target), "shard": f"{shard.index}/{shard.count}", "missing_parts": len(missing)})
        )
        return None
    complete = iter([part for part in finished if part is not None])
    return {name: [next(complete) for _ in parts] for name, parts in plans.items()}


def _publish(
    target: Path,
    inputs: Inputs,
    parents: list[Parent],
    overwrite: bool,
    hf_files: Path,
    recipe: Recipe,
    ends: DocumentTokens,
    choice: Choice,
    finished: Parts,
    validation_fraction: float,
    deduplicate: Deduplicate | None,
) -> dict[str, Any]:
    """Join the parts and publish. Returns the facts of the manifest."""
    every = [part for parts in finished.values() for part in parts]
    with publish(target, kind="dataset", inputs=inputs, overwrite=overwrite, parents=parents) as out:
        merged = merge(finished, recipe, validation_fraction, deduplicate, out.path, out.record_hash)
        copy_tokenizer(hf_files, out.path / "tokenizer")
        backend: dict[str, Any] = {"name": choice.name, "version": choice.version, "reason": choice.reason}
        if choice.name == FAST:
            backend |= {"compared_bytes": choice.compared_bytes, "sampled": f"1 text in {SAMPLED}"}
            backend["sampled_texts"] = sum(part.sampled for part in every)
        out.describe(
            format="indexed",
            splits={name: asdict(split) for name, split in merged.pop("splits").items()},
            vocab_size=recipe.vocab_size,
            eos_token_id=recipe.eos_token_id,
            end_of_document=ends.end,
            begin_of_document=ends.begin,
            dtype=token_dtype(recipe.vocab_size).name,
            tokenizer_hash=tokenizer_hash(hf_files),
            tokenizer_backend=backend,
            source_hash=_source_hash(finished),
            empty_documents=sum(part.empty for part in every),
            **merged,
        )
        return out.facts


def _source_hash(finished: dict[str, list[FinishedPart]]) -> str:
    digest = xxhash.xxh3_128()
    for name, parts in finished.items():
        digest.update(name.encode())
        for part in parts:
            digest.update(part.name.encode())
    return f"xxh3_128:{digest.hexdigest()}"
