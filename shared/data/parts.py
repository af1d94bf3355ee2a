"""Resumable tokenisation, in parts. A finished part is kept until the dataset is published.

A part is a sequence of consecutive source pieces. Its files are named by a hash of the pieces' content and of the recipe
(tokenizer, text key). So a resume finds finished parts by content; parts of a changed source have other names. Parts do not
depend on the number of workers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shared.checkpoint.files import sync
from shared.data.indexed import token_dtype
from shared.data.sources import Piece, is_rows, pieces, texts

PART_BYTES = 16 << 20  # source bytes per part: a kill loses less than minutes of work; small files share a part
BATCH_CHARACTERS = 1 << 20  # per call of the tokenizer
# One row per document. The hash is of its text only: equal texts have equal hashes.
DOCUMENT = np.dtype([("tokens", np.int32), ("bytes", np.int64), ("hash", np.uint64)])
# Split points of a long text that keep its tokens: after a line end, before a character other than white space.
CUT = re.compile(r"\n(?=\S)")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive pieces of the sources."""

    pieces: tuple[Piece, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes on disk."""
        return sum(piece.end - piece.start for piece in self.pieces)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of the tokenisation, sent to every worker."""

    tokenizer_json: str
    eos_token_id: int  # ends each document
    bos_token_id: int | None = None  # begins each document; None: nothing does
    vocab_size: int
    text_key: str

    @property
    def digest(self) -> bytes:
        """Hash of the recipe."""
        parts = [self.tokenizer_json, str(self.eos_token_id), str(self.vocab_size), self.text_key]
        if self.bos_token_id is not None:
            parts.append(str(self.bos_token_id))
        return xxhash.xxh3_128("\0".join(parts).encode()).digest()


@dataclass(frozen=True, kw_only=True)
class FinishedPart:
    """A part on disk: its ids and one `DOCUMENT` row per document."""

    prefix: Path
    source_bytes: int
    reused: bool
    """Whether an earlier run finished it."""
    empty: int
    """Number of documents without text, left out."""

    @property
    def name(self) -> str:
        """Hash of the content of its sources and of the recipe."""
        return self.prefix.name

    def documents(self) -> npt.NDArray[np.void]:
        """`DOCUMENT` rows in order, without the file's last row, the count of empty documents."""
        return np.load(_index_path(self.prefix))[:-1]

    def tokens(self, dtype: np.dtype) -> npt.NDArray[np.integer]:
        """Concatenated ids of all documents, memory-mapped."""
        path = _token_path(self.prefix)
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def plan(files: Iterable[Path]) -> list[Part]:
    """Cut the sources into parts of about `PART_BYTES`, in order."""
    parts: list[Part] = []
    waiting: list[Piece] = []
    for file in files:
        for piece in pieces(file, PART_BYTES):
            waiting.append(piece)
            if sum(piece.end - piece.start for piece in waiting) >= PART_BYTES:
                parts.append(Part(pieces=tuple(waiting)))
                waiting = []
    if waiting:
        parts.append(Part(pieces=tuple(waiting)))
    return parts


_worker: dict[str, Any] = {}  # what `init_worker` prepared in this process


def init_worker(recipe: Recipe, folder: Path) -> None:
    """Prepare this process for `tokenize_part`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(recipe.tokenizer_json)
    # <|endoftext|> inside a document is encoded as plain text; only `_encode` adds the tokens around a document.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _worker.update(recipe=recipe, folder=folder, tokenizer=tokenizer, cuts=_may_cut(tokenizer))


def tokenize_part(part: Part) -> FinishedPart:
    """Tokenise a part into the folder of `init_worker`, or reuse a finished one."""
    recipe: Recipe = _worker["recipe"]
    prefix = _worker["folder"] / _name(part, recipe)
    reused = _index_path(prefix).is_file()
    if not reused:
        _encode(part, recipe, prefix)
    empty = int(np.load(_index_path(prefix), mmap_mode="r")[-1]["tokens"])
    return FinishedPart(prefix=prefix, source_bytes=part.source_bytes, reused=reused, empty=empty)


def _encode(part: Part, recipe: Recipe, prefix: Path) -> None:
    documents: list[tuple[int, int, int]] = []
    empty = 0
    new = f".new-{os.getpid()}"
    tokens_new, index_new = Path(f"{prefix}.tokens{new}"), Path(f"{prefix}.documents.npy{new}")
    end = np.array([recipe.eos_token_id], token_dtype(recipe.vocab_size))
    begin = np.array([] if recipe.bos_token_id is None else [recipe.bos_token_id], end.dtype)
    try:
        with tokens_new.open("wb") as file:
            every = (text for piece in part.pieces for text in texts(piece, recipe.text_key))
            for batch in _batches(every):
                filled = [text for text in batch if text]
                empty += len(batch) - len(filled)
                for text, ids in zip(filled, encode(_worker["tokenizer"], filled, cuts=_worker["cuts"]), strict=True):
                    file.write(begin.tobytes() + ids.astype(end.dtype).tobytes() + end.tobytes())
                    raw = text.encode("utf-8")
                    documents.append((len(begin) + len(ids) + 1, len(raw), xxhash.xxh3_64_intdigest(raw)))
        sync(tokens_new)
        with index_new.open("wb") as file:
            np.save(file, np.array([*documents, (empty, 0, 0)], DOCUMENT))
        sync(index_new)
        tokens_new.replace(_token_path(prefix))
        index_new.replace(_index_path(prefix))  # last: marks the part as finished
    finally:
        tokens_new.unlink(missing_ok=True)
        index_new.unlink(missing_ok=True)


def encode(tokenizer: Any, batch: list[str], *, cuts: bool) -> Iterator[npt.NDArray[np.int64]]:
    """The ids of each text, int64.

    With `cuts`, long texts are encoded in stretches: the tokenizer needs some hundred bytes of memory per token of a text.
    """
    stretches = [_stretches(text) if cuts else [text] for text in batch]
    encoded = iter(tokenizer.encode_batch_fast([s for several in stretches for s in several], add_special_tokens=False))
    for several in stretches:
        yield np.concatenate([np.array(next(encoded).ids, np.int64) for _ in several])


def _stretches(text: str) -> list[str]:
    found, start = [], 0
    while len(text) - start > BATCH_CHARACTERS and (cut := CUT.search(text, start + BATCH_CHARACTERS)):
        found.append(text[start : cut.end()])
        start = cut.end()
    return [*found, text[start:]]


def _may_cut(tokenizer: Any) -> bool:
    """Whether texts may be split: False for tokenizers that prepend a space to a text, which changes the ids."""
    probe = "def f(x):\n    return x + 1\n\nclass A:\n\tb = 'c'\n\n\n# d e\nf\n"
    lines, start = [], 0
    for cut in CUT.finditer(probe):
        lines.append(probe[start : cut.end()])
        start = cut.end()
    lines.append(probe[start:])
    ids = [i for line in lines for i in tokenizer.encode(line, add_special_tokens=False).ids]
    return bool(ids == tokenizer.encode(probe, add_special_tokens=False).ids)


def _batches(every: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in every:
        batch.append(text)
        size += len(text) + 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _name(part: Part, recipe: Recipe) -> str:
    digest = xxhash.xxh3_128(recipe.digest)
    for piece in part.pieces:
        digest.update(f"{piece.end - piece.start} {is_rows(piece.path)} {piece.path.suffix}\0".encode())
        with piece.path.open("rb") as file:
            file.seek(piece.start)
            left = piece.end - piece.start
            while left and (block := file.read(min(left, 4 << 20))):
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


def _token_path(prefix: Path) -> Path:
    return Path(f"{prefix}.tokens")


def _index_path(prefix: Path) -> Path:
    return Path(f"{prefix}.documents.npy")
