"""Resumable tokenisation, in parts. A finished part is kept until the dataset is published.

A part is a sequence of consecutive source pieces. Its files are named by a hash of the pieces' content and of the recipe
(tokenizer, text key), and by the back end. So a resume finds finished parts by content; parts of a changed source have other
names. Parts do not depend on the number of workers or shards.
"""

from __future__ import annotations

import os
import secrets
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shared.checkpoint.files import sync, write_out
from shared.data.documents import are_lines, documents, line_blocks, place
from shared.data.indexed import token_dtype
from shared.data.minhash import SIGNATURE, Signatures
from shared.data.sources import Piece, is_rows, pieces
from shared.data.stretches import stretches
from shared.data.tokenizer_backends import (
    FAST,
    REFERENCE,
    SAMPLED,
    Backend,
    Compared,
    compare,
    first_difference,
    open_backend,
)
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
_block = memoryview(
    bytearray(1 << 18)
)  # what `_name` reads into: a new one each time would be mapped anew by the kernel


def init_worker(recipe: Recipe, folder: Path) -> None:
    """Prepare this process for `tokenize_part`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.clear()
    _worker.update(recipe=recipe, folder=folder)


def compare_texts(texts: list[str]) -> Compared:
    """`compare`, with the tokenizer of `init_worker`."""
    return compare(_worker["recipe"].tokenizer_json, texts)


def _backend(name: str) -> Backend:
    """The back end of this process. Opened when it is needed: which one can be is not known before texts are compared."""
    if name not in _worker:
        _worker[name] = open_backend(name, _worker["recipe"].tokenizer_json)
    return _worker[name]


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
class _Batch:
    """Stretches of documents that are encoded together."""

    texts: list[str]
    hashes: Sequence[int]  # of each stretch alone
    opens: npt.NDArray[np.bool_]  # whether the stretch begins a document
    closes: npt.NDArray[np.bool_]  # whether it ends one
    places: Sequence[tuple[Piece, int]]  # of each, the piece and the number of its document there


@dataclass(frozen=True, slots=True)
class _Places(Sequence[tuple[Piece, int]]):
    """The places of documents of one piece."""

    piece: Piece
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.piece, self.numbers[index]


def _encode(part: Part, recipe: Recipe, prefix: Path) -> None:
    new = f".new-{os.getpid()}-{secrets.token_hex(4)}"
    rows = _Rows()
    signatures = Signatures() if recipe.signatures else None
    places = [_token_path(prefix), *([_signature_path(prefix)] if signatures else []), _index_path(prefix)]
    written = [Path(f"{path}{new}") for path in places]  # the last marks the part as finished
    dtype = token_dtype(recipe.vocab_size)
    try:
        with written[0].open("wb") as file:
            for batch in _batches(part, recipe, rows, signatures):
                ids, lengths = _backend(recipe.backend).encode(batch.texts)
                if recipe.backend == FAST:
                    rows.sampled += _check_sample(batch, ids, lengths, recipe)
                framed, sizes = _framed(ids, lengths, batch, recipe, dtype)
                rows.add_tokens(sizes, batch.closes)
                start = file.tell()
                file.write(framed.data)
                write_out(file.fileno(), start, framed.nbytes)  # while the next batch is read: fsync then waits less
        if signatures:
            written[1].write_bytes(signatures.array().tobytes())
        with written[-1].open("wb") as file:
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
        self.tokens: list[npt.NDArray[np.int64]] = []  # of each stretch, batch by batch
        self.closes: list[npt.NDArray[np.bool_]] = []
        self.empty = self.sampled = 0

    def add_text(self, size: int, digest: int, second: int) -> None:
        """A document of so many bytes, with these hashes."""
        self.sizes.append(size)
        self.hashes.append(digest)
        self.seconds.append(second)

    def add_texts(self, texts: list[str]) -> Sequence[int]:
        """Whole documents. Returns their hashes."""
        raw = list(map(str.encode, texts))
        hashes = array("Q", map(xxhash.xxh3_64_intdigest, raw))
        self.sizes.extend(map(len, raw))
        self.hashes.extend(hashes)
        self.seconds.extend(map(_second_hash, raw))
        return hashes

    def add_tokens(self, sizes: npt.NDArray[np.int64], closes: npt.NDArray[np.bool_]) -> None:
        """The ids of the stretches of a batch, and which of them end a document."""
        self.tokens.append(sizes)
        self.closes.append(closes)

    def array(self) -> npt.NDArray[np.void]:
        """The rows, and one with the counts of empty documents and of sampled texts."""
        found = np.zeros(len(self.sizes) + 1, DOCUMENT)
        if self.tokens:
            ends = np.cumsum(np.concatenate(self.tokens))[np.concatenate(self.closes)]
            found["tokens"][:-1] = np.diff(ends, prepend=0)
        found["bytes"][:-1], found["hash"][:-1], found["second"][:-1] = self.sizes, self.hashes, self.seconds
        found[-1] = (self.empty, self.sampled, 0, 0)
        return found


_second_hash = partial(xxhash.xxh3_64_intdigest, seed=SECOND_SEED)


def _batches(part: Part, recipe: Recipe, rows: _Rows, signatures: Signatures | None) -> Iterator[_Batch]:
    """All documents of the part that are not empty; rows and signatures are told of each."""
    waiting = _Waiting(rows, signatures)
    for piece in part.pieces:
        if not are_lines(piece):
            for number, several in documents(piece, recipe.text_key, recipe.cut, BATCH_CHARACTERS):
                yield from waiting.add(several, piece, number)
            continue
        for numbers, texts in line_blocks(piece, recipe.text_key):
            if not all(texts):
                rows.empty += texts.count("")
                numbers, texts = list(compress(numbers, texts)), list(filter(None, texts))
            if not texts:
                continue
            if max(map(len, texts)) > BATCH_CHARACTERS:
                for number, text in zip(numbers, texts, strict=True):
                    yield from waiting.add(stretches(text, recipe.cut, BATCH_CHARACTERS), piece, number)
                continue
            yield from waiting.flush()
            whole = np.ones(len(texts), bool)
            yield _Batch(texts, rows.add_texts(texts), whole, whole, _Places(piece, numbers))
            if signatures is not None:
                for text in texts:
                    signatures.update(text)
                    signatures.close()
    yield from waiting.flush()


class _Waiting:
    """Collects stretches of documents, one by one, to batches."""

    def __init__(self, rows: _Rows, signatures: Signatures | None) -> None:
        self._rows, self._signatures = rows, signatures
        self._texts: list[str] = []
        self._hashes: list[int] = []
        self._opens: list[bool] = []
        self._closes: list[bool] = []
        self._places: list[tuple[Piece, int]] = []
        self._size = 0

    def add(self, several: Iterable[str], piece: Piece, number: int) -> Iterator[_Batch]:
        """The stretches of a document. Yields batches that are full; the last stretch waits until it is known to be that."""
        digest, second, size = xxhash.xxh3_64(), xxhash.xxh3_64(seed=SECOND_SEED), 0
        first = True
        for text in filter(None, several):
            if not first and (self._size >= BATCH_CHARACTERS or len(self._texts) == BATCH_TEXTS):
                yield from self.flush()
            raw = text.encode()
            digest.update(raw)
            second.update(raw)
            size += len(raw)
            if self._signatures is not None:
                self._signatures.update(text)
            self._texts.append(text)
            self._hashes.append(xxhash.xxh3_64_intdigest(raw))
            self._opens.append(first)
            self._closes.append(False)
            self._places.append((piece, number))
            self._size += len(text) + 1
            first = False
        if first:
            self._rows.empty += 1
            return
        self._closes[-1] = True
        self._rows.add_text(size, digest.intdigest(), second.intdigest())
        if self._signatures is not None:
            self._signatures.close()
        if self._size >= BATCH_CHARACTERS or len(self._texts) == BATCH_TEXTS:
            yield from self.flush()

    def flush(self) -> Iterator[_Batch]:
        """What was collected."""
        if self._texts:
            opens, closes = np.array(self._opens), np.array(self._closes)
            yield _Batch(self._texts, self._hashes, opens, closes, self._places)
            self._texts, self._hashes, self._opens, self._closes, self._places = [], [], [], [], []
            self._size = 0


def _framed(
    ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64], batch: _Batch, recipe: Recipe, dtype: np.dtype
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
    """The ids with the tokens around documents, and how many each stretch has then."""
    begins = recipe.bos_token_id is not None
    sizes = lengths + batch.closes + (batch.opens if begins else 0)
    ends = np.cumsum(sizes)
    framed = np.empty(int(ends[-1]), dtype)
    plain = np.ones(len(framed), bool)
    last = ends[batch.closes] - 1
    plain[last] = False
    framed[last] = recipe.eos_token_id
    if begins:
        starts = (ends - sizes)[batch.opens]
        plain[starts] = False
        framed[starts] = recipe.bos_token_id
    framed[plain] = ids
    return framed, sizes


def _check_sample(batch: _Batch, ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64], recipe: Recipe) -> int:
    """Encode one text in `SAMPLED`, chosen by its hash, by the reference too. Returns how many.

    Raises:
        UserError: the ids differ; names the document.
    """
    (chosen,) = np.nonzero(np.array(batch.hashes, np.uint64) % np.uint64(SAMPLED) == 0)
    if not len(chosen):
        return 0
    ends = np.cumsum(lengths)
    own = np.concatenate([ids[ends[index] - lengths[index] : ends[index]] for index in chosen])
    texts = [batch.texts[index] for index in chosen]
    different = first_difference(_Known(own, lengths[chosen]), _backend(REFERENCE), texts)
    if different is not None:
        piece, number = batch.places[chosen[different]]
        raise UserError(
            f"{place(piece, number)}: {FAST} gives this text other ids than {REFERENCE}, though it gave the same before; run "
            "it again with --tokenizer-backend tokenizers"
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


def _name(part: Part, recipe: Recipe) -> str:
    digest = xxhash.xxh3_128(recipe.digest)
    for piece in part.pieces:
        digest.update(f"{piece.end - piece.start} {is_rows(piece.path)} {piece.path.suffix}\0".encode())
        with piece.path.open("rb", buffering=0) as file:
            file.seek(piece.start)
            left = piece.end - piece.start
            while left and (size := file.readinto(_block[: min(left, len(_block))])):
                digest.update(_block[:size])
                left -= size
    return digest.hexdigest()


def _token_path(prefix: Path) -> Path:
    return Path(f"{prefix}.tokens")


def _signature_path(prefix: Path) -> Path:
    return Path(f"{prefix}.minhash")


def _index_path(prefix: Path) -> Path:
    return Path(f"{prefix}.documents.npy")
