"""What `--data` names: datasets of `prepare`, and plain Megatron pairs made elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shared.checkpoint.directory.open import Checkpoint, open_checkpoint, verify_content
from shared.console import progress
from shared.data.indexed import IndexedReader
from shared.data.tokenizer import open_tokenizer
from shared.errors import UserError
from shared.foreign_formats import indexed_prefix

Format = Literal["indexed", "packed"]
_TOOLS: dict[Format, str] = {"indexed": "pretrain", "packed": "sft"}
_ANNOUNCE = 4 << 30  # bytes above which checking shows its progress


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One of the directories or prefixes of `--data`."""

    path: Path
    name: str  # in the plan and the manifest
    splits: dict[str, Any]  # name of a split -> its facts
    vocab_size: int
    tokenizer: Path  # the directory with the tokenizer's files
    facts: dict[str, Any] = field(default_factory=dict)  # of the manifest
    checkpoint: Checkpoint | None = None  # None: a plain pair

    def files(self, split: str) -> Path:
        """The path of a split's files, without their suffix."""
        return self.path / split if self.checkpoint else self.path

    def verify(self) -> None:
        """Read every byte: against the manifest's hashes, or, of a plain pair, every token id. UserError names the file."""
        if self.checkpoint:
            verify_content(self.checkpoint, flag="--data")
            return
        reader = IndexedReader(self.path, flag="--data")
        if reader.ids.nbytes < _ANNOUNCE:
            reader.check(self.vocab_size)
            return
        with progress(reader.ids.nbytes, "bytes", f"reading {self.name}.bin") as advance:
            reader.check(self.vocab_size, advance=advance)


def open_data(paths: Sequence[Path], *, data_format: Format, tokenizer: Path | None = None) -> tuple[DataSource, ...]:
    """Open what `--data` names. `tokenizer`: the directory that says what the ids of plain pairs mean.

    Raises:
        UserError: not such a dataset, or damaged; one is given twice; `tokenizer` is missing, or not needed.
    """
    resolved = [path.resolve() for path in paths]
    if twice := next((path for path, place in zip(paths, resolved, strict=True) if resolved.count(place) > 1), None):
        raise UserError(f"--data {twice}: given twice; give it once, with a larger share of --data-weights")
    plain = [path for path in paths if not path.is_dir() and indexed_prefix(path)]
    if plain and data_format == "packed":
        raise UserError(
            f"--data {plain[0]} is a plain Megatron pair, without conversations; make one with `sft prepare`"
        )
    if plain and tokenizer is None:
        raise UserError(
            f"--data {plain[0]} is a plain Megatron pair, which does not say what its ids mean; name the directory of its "
            "tokenizer with --tokenizer"
        )
    if tokenizer is not None and not plain:
        raise UserError(
            "--tokenizer belongs to plain Megatron pairs; the data given has its own tokenizer; leave it out"
        )
    short = [path.name for path in paths]
    names = [path.name if short.count(path.name) == 1 else str(path) for path in paths]
    return tuple(
        _plain(path, name, tokenizer) if tokenizer and path in plain else _prepared(path, name, data_format)
        for path, name in zip(paths, names, strict=True)
    )


def _prepared(path: Path, name: str, data_format: Format) -> DataSource:
    dataset = open_checkpoint(path, kinds=("dataset",), flag="--data", verify="sizes")
    if dataset.facts.get("format") != data_format:
        raise UserError(
            f"--data {path} holds a {dataset.facts.get('format')} dataset; make one with `{_TOOLS[data_format]} prepare`"
        )
    return DataSource(
        path=path,
        name=name,
        splits=dataset.facts["splits"],
        vocab_size=dataset.facts["vocab_size"],
        tokenizer=dataset.hf_files,
        facts=dataset.facts,
        checkpoint=dataset,
    )


def _plain(path: Path, name: str, tokenizer: Path) -> DataSource:
    prefix = indexed_prefix(path)
    assert prefix is not None
    reader = IndexedReader(prefix, flag="--data")
    hf_files = open_checkpoint(tokenizer, kinds=("tokenizer", "hf", "megatron"), flag="--tokenizer", verify="small")
    return DataSource(
        path=prefix,
        name=name,
        splits={"train": {"tokens": reader.tokens, "documents": reader.documents}},
        vocab_size=len(open_tokenizer(hf_files.hf_files, needs_eos=False)),
        tokenizer=hf_files.hf_files,
    )
