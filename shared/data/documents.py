"""The documents of a piece of the sources, fast and in bounded memory: what `pretrain prepare` reads.

It accepts what `sources.texts` accepts, with the same texts and messages: orjson reads a line, and what it refuses is read
again by `sources`. Lines are read a block at a time, without a step of Python for each. A document comes in stretches, so that a
text file of any length takes the memory of one stretch.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from shared.data.sources import (
    Piece,
    Row,
    decode,
    is_array,
    is_compressed,
    is_rows,
    is_table,
    line_row,
    lines_before,
    open_uncompressed,
    row_text,
    rows,
)
from shared.data.stretches import file_stretches, stretches
from shared.data.table import table_rows
from shared.errors import UserError

ROW_BYTES = 32 << 20  # of a line of JSON or an array of them; reading one takes up to six times as much
BLOCK_BYTES = 1 << 20  # of lines that are read, and encoded, at a time; with fewer, calls of the tokenizer take longer
_TABLE_BYTES = 8 << 20  # of rows of a table that are read at a time


def documents(piece: Piece, text_key: str, cut: str | None, size: int) -> Iterator[tuple[int, Iterable[str]]]:
    """Number in the piece, from 1, and stretches of every document. The stretches must be read before the next document.

    Args:
        piece: of a source file.
        text_key: the key of the text in rows.
        cut: where a text may be cut (`stretches.cut_of`).
        size: characters of a stretch.

    Raises:
        UserError: as `sources.texts`; a line of JSON or an array has more than `ROW_BYTES`.
    """
    path = piece.path
    if not is_rows(path):
        with open_uncompressed(path) as file:
            yield 1, _whole(file, path) if cut is None else file_stretches(file, path, cut, size)
        return
    for number, text in _row_texts(piece, text_key):
        yield number, (text,) if len(text) <= size else stretches(text, cut, size)


def place(piece: Piece, number: int) -> str:
    """File and line (or row) of a document, for messages."""
    if not is_rows(piece.path):
        return str(piece.path)
    return f"{piece.path}:{lines_before(piece) + number}"


def are_lines(piece: Piece) -> bool:
    """Whether the piece is JSON lines, which `line_blocks` reads."""
    path = piece.path
    return is_rows(path) and not is_table(path) and not (piece.start == 0 and is_array(path))


def line_blocks(piece: Piece, text_key: str) -> Iterator[tuple[Sequence[int], list[str]]]:
    """The texts of a piece of JSON lines, many at a time, and the number in the piece of each, from 1.

    Raises:
        UserError: as `documents`.
    """
    before = 0
    with open_uncompressed(piece.path) as file:
        if piece.start:
            file.seek(piece.start)
        # A compressed file is one piece, and its `end` counts compressed bytes.
        size = 1 << 62 if is_compressed(piece.path) else piece.end - piece.start
        for lines in _blocks(file, size):
            for number, line in enumerate(lines, start=before + 1) if _has_long(lines) else ():
                if len(line) > ROW_BYTES:
                    raise UserError(
                        f"{place(piece, number)}: a row of more than {ROW_BYTES >> 20} MiB; split its text, or give it as a "
                        "text file, which may have any length"
                    )
            yield _texts(lines, piece, text_key, before)
            before += len(lines)


def _blocks(file: IO[bytes], left: int) -> Iterator[list[bytes]]:
    """The lines of the next `left` bytes, without their ends; a longer line than `ROW_BYTES` is cut behind that."""
    while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
        if not block.endswith(b"\n"):
            block += file.readline(ROW_BYTES + 1)
        left -= len(block)
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        yield lines


def _has_long(lines: list[bytes]) -> bool:
    return max(map(len, lines)) > ROW_BYTES


def _texts(lines: list[bytes], piece: Piece, text_key: str, before: int) -> tuple[Sequence[int], list[str]]:
    """Numbers and texts of these lines, of which so many in the piece come before."""
    import orjson

    try:
        texts = list(map(itemgetter(text_key), map(orjson.loads, lines)))
    except (ValueError, KeyError, TypeError):
        texts = []
    if texts and set(map(type, texts)) == {str}:
        return range(before + 1, before + 1 + len(lines)), texts
    # A line is blank, wrong, or JSON of json.loads only (NaN, a byte order mark).
    numbers, texts = [], []
    for number, line in enumerate(lines, start=before + 1):
        try:
            text = orjson.loads(line)[text_key]
        except (ValueError, KeyError, TypeError):
            text = None
        if type(text) is not str:
            if not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            text = row_text(line_row(line, piece.path, lines_before(piece) + number), text_key)
        numbers.append(number)
        texts.append(text)
    return numbers, texts


def _row_texts(piece: Piece, text_key: str) -> Iterator[tuple[int, str]]:
    path = piece.path
    if is_table(path):
        for number, value in enumerate(table_rows(path, batch_bytes=_TABLE_BYTES), start=1):
            yield number, row_text(Row(value=value, path=path, line=number), text_key)
    elif are_lines(piece):
        for numbers, texts in line_blocks(piece, text_key):
            yield from zip(numbers, texts, strict=True)
    else:
        _check_array(path)
        for row in rows(piece):
            yield row.line, row_text(row, text_key)


def _check_array(path: Path) -> None:
    with open_uncompressed(path) as file:
        if len(file.read(ROW_BYTES + 1)) > ROW_BYTES:
            raise UserError(
                f"{path}: a JSON array of more than {ROW_BYTES >> 20} MiB, which is read as one; write it as JSON lines: "
                f"`jq -c '.[]' {path.name} > {path.stem}.jsonl`"
            )


def _whole(file: Any, path: Path) -> Iterator[str]:
    """The text of a file that cannot be cut."""
    content = file.read(ROW_BYTES + 1)
    if len(content) > ROW_BYTES:
        raise UserError(
            f"{path}: a text of more than {ROW_BYTES >> 20} MiB, and this tokenizer's ids depend on the whole of it; split "
            "the file into documents"
        )
    yield decode(content, path)
