"""The documents of a piece of the sources, fast and in bounded memory: what `pretrain prepare` reads.

It accepts what `sources.texts` accepts, with the same texts and messages: orjson reads a line, and what it refuses is read
again by `sources`. A document comes in stretches, so that a text file of any length takes the memory of one stretch.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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


def _row_texts(piece: Piece, text_key: str) -> Iterator[tuple[int, str]]:
    path = piece.path
    if is_table(path):
        for number, value in enumerate(table_rows(path, batch_bytes=_TABLE_BYTES), start=1):
            yield number, row_text(Row(value=value, path=path, line=number), text_key)
    elif piece.start == 0 and is_array(path):
        _check_array(path)
        for row in rows(piece):
            yield row.line, row_text(row, text_key)
    else:
        yield from _line_texts(piece, text_key)


def _line_texts(piece: Piece, text_key: str) -> Iterator[tuple[int, str]]:
    import orjson

    loads, left = orjson.loads, piece.end - piece.start
    with open_uncompressed(piece.path) as file:
        if piece.start:
            file.seek(piece.start)
        if is_compressed(piece.path):  # one piece, and its `end` counts compressed bytes
            left = 1 << 62
        number = 0
        while left > 0 and (line := file.readline(ROW_BYTES + 1)):
            number += 1
            left -= len(line)
            if len(line) > ROW_BYTES:
                raise UserError(
                    f"{place(piece, number)}: a row of more than {ROW_BYTES >> 20} MiB; split its text, or give it as a text "
                    "file, which may have any length"
                )
            try:
                text = loads(line)[text_key]
            except (ValueError, KeyError, TypeError):
                text = None
            if (
                type(text) is not str
            ):  # a line that is blank, wrong, or JSON of json.loads only (NaN, a byte order mark)
                if not line.removeprefix(codecs.BOM_UTF8).strip():
                    continue
                text = row_text(line_row(line, piece.path, lines_before(piece) + number), text_key)
            yield number, text


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
