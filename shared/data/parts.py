"""Resumable tokenisation, in parts. A finished part is kept until the dataset is published.

A part is a sequence of consecutive source pieces. Its files are named by a hash of the pieces' content and of the recipe
(tokenizer, text key), and by the back end. So a resume finds finished parts by content; parts of a changed source have other
names. Parts do not depend on the number of workers or shards.
"""

from __future__ import annotations

import os
import secrets
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shared.checkpoint.files import sync
from shared.data.documents import documents, place
from shared.data.indexed import token_dtype
from shared.data.minhash import SIGNATURE, Signatures
from shared.data.sources import Piece, is_rows, pieces
from shared.data.tokenizer_backends import FAST, REFERENCE, SAMPLED, Backend, Reference, first_difference, open_backend
from shared.errors import UserError

PART_BYTES = 16 << 20  # source bytes per part: a kill loses less than minutes of work; small files share a part
BATCH_CHARACTERS = 1 << 20  # per call of the tokenizer
BATCH_TEXTS = 1 << 15
# One row per document. The hashes are of its text only: equal texts have equal hashes. `second` is another hash of 64 bits.
DOCUMENT = np.dtype([("tokens", np.int32), ("bytes", np.int64), ("hash", np.uint64), ("second", np.uint64)])
SECOND_SEED = 1


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
    cut: str | None = None  # where a text may be cut
    backend: str = REFERENCE
    signatures: bool = False  # whether MinHash signatures are kept

    @property
    def digest(self) -> bytes:
        """Hash of what the ids depend on."""
        parts = [self.tokenizer_json, str(self.eos_token_id), str(self.vocab_size), self.text_key]
        if self.bos_token_id is not None:
            parts.append(str(self.bos_token_id))
        return xxhash.xxh3_128("\0".join(parts).encode()).digest()

    @property
    def suffix(self) -> str:
        """End of the names of its files: by which back end, and whether with signatures. The ids do not depend on it."""
        return f"-{self.backend}" + ("-minhash" if self.signatures else "")


@dataclass(frozen=True, kw_only=True)
class FinishedPart:
    """A part on disk: its ids and one `DOCUMENT` row per document."""

    prefix: Path
    source_bytes: int
    reused: bool
    """Whether an earlier run finished it."""
    empty: int
    """Number of documents without text, left out."""
    sampled: int
    """Number of stretches of text that both back ends encoded, with the same ids."""

    @property
    def name(self) -> str:
        """Hash of the content of its sources and of the recipe."""
        return self.prefix.name.partition("-")[0]

    def documents(self) -> npt.NDArray[np.void]:
        """`DOCUMENT` rows in order, without the file's last row, the count of empty documents."""
        return np.load(_index_path(self.prefix))[:-1]

    def tokens(self, dtype: np.dtype) -> npt.NDArray[np.integer]:
        """Concatenated ids of all documents, memory-mapped."""
        path = _token_path(self.prefix)
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)

    def signatures(self) -> npt.NDArray[np.uint64]:
        """The MinHash bands of each document, `[documents, bands]`, memory-mapped."""
        path = _signature_path(self.prefix)
        return np.fromfile(path, SIGNATURE).reshape(-1, Signatures.bands)


def plan(files: Iterable[Path]) -> list[Part]:
    """Cut the sources into parts of about `PART_BYTES`, in order."""
    parts: list[Part] = []
    waiting: list[Piece] = []
    size = 0
    for file in files:
        for piece in pieces(file, PART_BYTES):
            waiting.append(piece)
            size += piece.end - piece.start
            if size >= PART_BYTES:
                parts.append(Part(pieces=tuple(waiting)))
                waiting, size = [], 0
    if waiting:
        parts.append(Part(pieces=tuple(waiting)))
    return parts


_worker: dict[str, Any] = {}  # what `init_worker` prepared in this process


def init_worker(recipe: Recipe, folder: Path) -> None:
    """Prepare this process for `tokenize_part`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(recipe=recipe, folder=folder, backend=open_backend(recipe.backend, recipe.tokenizer_json))
    _worker.pop("reference", None)


def tokenize_part(part: Part) -> FinishedPart:
    """Tokenise a part into the folder of `init_worker`, or reuse a finished one."""
    recipe: Recipe = _worker["recipe"]
    prefix = _worker["folder"] / (_name(part, recipe) + recipe.suffix)
    reused = _index_path(prefix).is_file()
    if not reused:
        _encode(part, recipe, prefix)
    return finished_part(part, prefix, reused=reused)


def finished_part(part: Part, prefix: Path, *, reused: bool) -> FinishedPart:
    """The part whose files are at `prefix`."""
    last = np.load(_index_path(prefix), mmap_mode="r")[-1]
    return FinishedPart(
        prefix=prefix,
        source_bytes=part.source_bytes,
        reused=reused,
        empty=int(last["tokens"]),
        sampled=int(last["bytes"]),
    )


def is_finished(prefix: Path) -> bool:
    """Whether a part's files are there."""
    return _index_path(prefix).is_file()


@dataclass(slots=True)
class _Stretch:
    """A stretch of a document."""

    text: str
    hash: int  # of the stretch alone
    first: bool
    last: bool
    piece: Piece
    number: int  # of the document in the piece


def _encode(part: Part, recipe: Recipe, prefix: Path) -> None:
    new = f".new-{os.getpid()}-{secrets.token_hex(4)}"
    places = [_token_path(prefix), _signature_path(prefix), _index_path(prefix)]  # the last marks the part as finished
    written = [Path(f"{path}{new}") for path in places]
    rows = _Rows()
    signatures = Signatures() if recipe.signatures else None
    dtype = token_dtype(recipe.vocab_size)
    try:
        with written[0].open("wb") as file:
            for batch in _batches(_stretches(part, recipe, rows, signatures)):
                ids, lengths = _worker["backend"].encode([stretch.text for stretch in batch])
                if recipe.backend == FAST:
                    rows.sampled += _check_sample(batch, ids, lengths, recipe)
                framed, sizes = _framed(ids, lengths, batch, recipe)
                rows.add_tokens(sizes, batch)
                file.write(framed.astype(dtype).tobytes())
        written[1].write_bytes(signatures.array().tobytes() if signatures else b"")
        with written[2].open("wb") as file:
            np.save(file, rows.array())
        for path, final in zip(written, places, strict=True):
            sync(path)
            path.replace(final)
    finally:
        for path in written:
            path.unlink(missing_ok=True)


class _Rows:
    """`DOCUMENT` rows of a part: text first, ids when its last stretch is encoded."""

    def __init__(self) -> None:
        self.sizes, self.hashes, self.seconds = array("q"), array("Q"), array("Q")
        self.tokens: list[npt.NDArray[np.int64]] = []
        self.open = 0  # ids of the document whose end is in a later batch
        self.empty = self.sampled = 0

    def add_text(self, size: int, digest: int, second: int) -> None:
        """A document of so many bytes, with these hashes."""
        self.sizes.append(size)
        self.hashes.append(digest)
        self.seconds.append(second)

    def add_tokens(self, sizes: npt.NDArray[np.int64], batch: list[_Stretch]) -> None:
        """Count the ids of the documents that end in the batch."""
        ends = np.array([stretch.last for stretch in batch])
        totals = np.concatenate([[0], np.cumsum(sizes)])[1:][ends] + self.open
        self.tokens.append(np.diff(totals, prepend=0))
        self.open = int(sizes.sum()) + self.open - (int(totals[-1]) if len(totals) else 0)

    def array(self) -> npt.NDArray[np.void]:
        """The rows, and one with the counts of empty documents and of sampled texts."""
        found = np.zeros(len(self.sizes) + 1, DOCUMENT)
        if self.tokens:
            found["tokens"][:-1] = np.concatenate(self.tokens)
        found["bytes"][:-1], found["hash"][:-1], found["second"][:-1] = self.sizes, self.hashes, self.seconds
        found[-1] = (self.empty, self.sampled, 0, 0)
        return found


def _stretches(part: Part, recipe: Recipe, rows: _Rows, signatures: Signatures | None) -> Iterator[_Stretch]:
    """Every stretch of the part's documents that are not empty; rows and signatures are told of each document."""
    for piece in part.pieces:
        for number, several in documents(piece, recipe.text_key, recipe.cut, BATCH_CHARACTERS):
            digest, second, size = xxhash.xxh3_64(), xxhash.xxh3_64(seed=SECOND_SEED), 0
            waiting: _Stretch | None = None
            for text in filter(None, several):
                raw = text.encode("utf-8")
                digest.update(raw)
                second.update(raw)
                size += len(raw)
                if signatures is not None:
                    signatures.update(text)
                if waiting is not None:
                    yield waiting
                waiting = _Stretch(text, xxhash.xxh3_64_intdigest(raw), waiting is None, False, piece, number)
            if waiting is None:
                rows.empty += 1
                continue
            waiting.last = True
            rows.add_text(size, digest.intdigest(), second.intdigest())
            if signatures is not None:
                signatures.close()
            yield waiting


def _framed(
    ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64], batch: list[_Stretch], recipe: Recipe
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """The ids with the tokens around documents, and how many each stretch has then."""
    last = np.array([stretch.last for stretch in batch])
    first = np.array([stretch.first for stretch in batch]) & (recipe.bos_token_id is not None)
    sizes = lengths + last + first
    ends = np.cumsum(sizes)
    framed = np.empty(int(ends[-1]), np.uint32)
    plain = np.ones(len(framed), bool)
    plain[ends[last] - 1] = False
    framed[ends[last] - 1] = recipe.eos_token_id
    if recipe.bos_token_id is not None:
        starts = (ends - sizes)[first]
        plain[starts] = False
        framed[starts] = recipe.bos_token_id
    framed[plain] = ids
    return framed, sizes


def _check_sample(
    batch: list[_Stretch], ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64], recipe: Recipe
) -> int:
    """Encode one text in `SAMPLED`, chosen by its hash, by the reference too. Returns how many.

    Raises:
        UserError: the ids differ; names the document.
    """
    chosen = [index for index, each in enumerate(batch) if not each.hash % SAMPLED]
    if not chosen:
        return 0
    if "reference" not in _worker:
        _worker["reference"] = Reference(recipe.tokenizer_json)
    ends = np.cumsum(lengths)
    own = np.concatenate([ids[ends[index] - lengths[index] : ends[index]] for index in chosen])
    different = first_difference(
        _Known(own, lengths[chosen]), _worker["reference"], [batch[index].text for index in chosen]
    )
    if different is not None:
        stretch = batch[chosen[different]]
        raise UserError(
            f"{place(stretch.piece, stretch.number)}: {FAST} gives this text other ids than {REFERENCE}, though it gave the "
            "same before; run it again with --tokenizer-backend tokenizers"
        )
    return len(chosen)


@dataclass
class _Known(Backend):
    """Ids that are there already."""

    ids: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.int64]

    def encode(self, texts: list[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        assert len(texts) == len(self.lengths)
        return self.ids, self.lengths


def _batches(every: Iterable[_Stretch]) -> Iterator[list[_Stretch]]:
    batch: list[_Stretch] = []
    size = 0
    for stretch in every:
        batch.append(stretch)
        size += len(stretch.text) + 1
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_TEXTS:
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


def _signature_path(prefix: Path) -> Path:
    return Path(f"{prefix}.minhash")


def _index_path(prefix: Path) -> Path:
    return Path(f"{prefix}.documents.npy")
