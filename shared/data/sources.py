"""Text sources: files of text or rows, plain or compressed, and folders of them, read in a fixed order.

A *text* file is one document. A file of *rows* has one document per row: JSON lines (`.jsonl`, `.ndjson`, `.jsonlines`),
a table (`.parquet`, `.arrow`), or a `.json` that begins with a line that is an object, or with an array of objects. `rows`
also reads a JSON array of objects under any name. Text and JSON may be compressed (`.gz`, `.zst`). A folder may be one that
`datasets` saved: `folders`. Error messages name file and line.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from shared.data.folders import CARDS, folder_files
from shared.data.table import table_rows
from shared.data.zstd import open_frames
from shared.errors import UserError

LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
TABLE_SUFFIXES = (".parquet", ".arrow")
COMPRESSED_SUFFIXES = (".gz", ".zst")
# Binary formats, refused by name: read as text they would fail with a confusing "not UTF-8".
FOREIGN_SUFFIXES = (".bin", ".idx", ".npy", ".safetensors", ".zip", ".tar", ".xz", ".bz2")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A byte range of one source file, split between documents.

    Only uncompressed JSON lines are split; any other file is one piece.
    """

    path: Path
    start: int
    """First byte."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a JSON-lines file, or one object of an array or a table."""

    value: dict[str, Any]
    path: Path
    line: int
    """Number of the line, the object or the row in the file, from 1."""

    def error(self, problem: str) -> UserError:
        """UserError with file and line of this row."""
        return UserError(f"{self.path}:{self.line}: {problem}")


Reject = Callable[[int, str, Any], None]
"""Told of a row that cannot be read: its number, the reason, and what stands there (an object or text)."""


def is_rows(path: Path) -> bool:
    """Whether the file holds rows (compressed or not): by its name, or of a `.json` by how it begins."""
    suffix = _inner_suffix(path)
    return suffix in LINE_SUFFIXES or is_table(path) or (suffix == ".json" and _begins_with_rows(path))


def may_hold_rows(path: Path) -> bool:
    """Whether the file holds rows, by its name alone."""
    return _inner_suffix(path) in (*LINE_SUFFIXES, ".json") or is_table(path)


def is_table(path: Path) -> bool:
    """Whether the file is a table of columns, by its name."""
    return path.suffix.lower() in TABLE_SUFFIXES


def is_compressed(path: Path) -> bool:
    """Whether the file is compressed, by its name."""
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def expand(paths: Iterable[Path], *, flag: str, split: str | None = None, rows_only: bool = False) -> list[Path]:
    """Every source file of `paths`: files as given, files of a folder sorted by relative path.

    Hidden files and folders (a leading dot) inside a folder are left out. The order depends on names only.

    Args:
        paths: files and folders; a folder may be one that `datasets` saved.
        flag: their flag, for errors.
        split: of every folder, the files of this split only.
        rows_only: of every folder, leave out files that hold no rows by their name (README.md ...).

    Raises:
        UserError: a path does not exist; there is no file; a file is given twice; a format is not supported.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = folder_files(path, split=split, flag=flag)
            files += [f for f in inside if not rows_only or (may_hold_rows(f) and f.name not in CARDS)]
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{flag} {path}: no such file or directory")
    if not files:
        raise UserError(f"{flag} {','.join(map(str, paths))}: contains no files")
    seen: set[Path] = set()
    for file in files:
        if _inner_suffix(file) in FOREIGN_SUFFIXES:
            raise UserError(
                f"{flag} {file}: {file.suffix} is not supported; give text, JSON lines (also .gz, .zst) or parquet"
            )
        if (resolved := file.resolve()) in seen:
            raise UserError(f"{flag} {file}: given twice")
        seen.add(resolved)
    return files


def pieces(path: Path, piece_bytes: int) -> list[Piece]:
    """Split a file into independent pieces of about `piece_bytes`.

    Only uncompressed JSON lines can be split; any other file is one piece.
    """
    size = path.stat().st_size
    if not is_rows(path) or is_table(path) or is_compressed(path) or size <= piece_bytes or is_array(path):
        return [Piece(path=path, start=0, end=size)]
    bounds = [0]
    with path.open("rb") as file:
        while bounds[-1] + piece_bytes < size:
            file.seek(bounds[-1] + piece_bytes)
            while (block := file.readline(1 << 20)) and not block.endswith(b"\n"):
                pass  # to the end of the current line
            bounds.append(file.tell())
    if bounds[-1] < size:
        bounds.append(size)
    return [Piece(path=path, start=start, end=end) for start, end in pairwise(bounds)]


def rows(piece: Piece, *, reject: Reject | None = None) -> Iterator[Row]:
    """The rows of a piece: JSON lines, a JSON array of objects, or a table. Empty lines are skipped.

    With `reject`, a row that cannot be read is handed to it, and the next one is read.

    Raises:
        UserError: a line is not UTF-8, not JSON or not a JSON object; a text in it has a lone surrogate.
    """
    if is_table(piece.path):
        values = table_rows(piece.path)
    elif piece.start == 0 and is_array(piece.path):
        with open_uncompressed(piece.path) as file:
            values = iter(_json(decode(file.read(), piece.path), piece.path, 1))
    else:
        yield from _lines(piece, reject)
        return
    for number, value in enumerate(values, start=1):
        try:
            row = _row(value, piece.path, number)
        except UserError as error:
            if reject is None:
                raise
            reject(number, reason(error, piece.path), value)
        else:
            yield row


def reason(error: UserError, path: Path) -> str:
    """The error without the file and line that it begins with."""
    text = str(error)
    return text.removeprefix(f"{path}:").partition(": ")[2] if text.startswith(f"{path}:") else text


def rows_of(path: Path, *, flag: str) -> Iterator[Row]:
    """The rows of a file or of every file of a folder, in order."""
    for file in expand([path], flag=flag, rows_only=True):
        yield from rows(Piece(path=file, start=0, end=file.stat().st_size))


def _lines(piece: Piece, reject: Reject | None) -> Iterator[Row]:
    line_number = lines_before(piece)
    with open_uncompressed(piece.path) as file:
        position = piece.start
        if position:
            file.seek(position)
        for line in file:
            line_number += 1
            position += len(line)
            if line.removeprefix(codecs.BOM_UTF8).strip():
                try:
                    row = line_row(line, piece.path, line_number)
                except UserError as error:
                    if reject is None:
                        raise
                    reject(line_number, reason(error, piece.path), line.decode("utf-8", "replace").rstrip())
                else:
                    yield row
            # A compressed file is one piece; its `end` counts compressed bytes.
            if not is_compressed(piece.path) and position >= piece.end:
                return


def line_row(line: bytes, path: Path, number: int) -> Row:
    """The row in a line of JSON.

    Raises:
        UserError: the line is not UTF-8, not JSON or not a JSON object; a text in it has a lone surrogate.
    """
    return _row(_json(decode(line, path, first_line=number).rstrip(), path, number), path, number)


def texts(piece: Piece, text_key: str) -> Iterator[str]:
    """The documents of a piece: the file's text, or the value of `text_key` in every row.

    Raises:
        UserError: the file is not UTF-8, or a row has no such key or no string under it.
    """
    if not is_rows(piece.path):
        with open_uncompressed(piece.path) as file:
            yield decode(file.read(), piece.path)
        return
    for row in rows(piece):
        yield row_text(row, text_key)


def row_text(row: Row, text_key: str) -> str:
    """The text of a row.

    Raises:
        UserError: the row has no such key, or no string under it.
    """
    if text_key not in row.value:
        keys = ", ".join(list(row.value)[:8])
        raise row.error(f"no key {text_key!r} (the row has: {keys}); name the key with --text-key")
    text = row.value[text_key]
    if not isinstance(text, str):
        raise row.error(f"{text_key!r} is {type(text).__name__}, not a string")
    return text


def decode(content: bytes, path: Path, *, first_line: int = 1) -> str:
    """Decode strict UTF-8, without a byte order mark. UserError names the line of the first invalid byte."""
    if first_line == 1:
        content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise decode_error(error, path, first_line) from None


def decode_error(error: UnicodeDecodeError, path: Path, first_line: int) -> UserError:
    """UserError with the line of the first invalid byte; the bytes that were decoded begin in `first_line`."""
    content = error.object
    line = first_line + content.count(b"\n", 0, error.start)
    utf16 = first_line == 1 and content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    name = "UTF-16" if utf16 else "LATIN1"
    return UserError(
        f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); leave the file out, or convert it to UTF-8: "
        f"`iconv -f {name} -t UTF-8` if it is {name}"
    )


def is_array(path: Path) -> bool:
    """Whether the first character of a file is the bracket of a JSON array."""
    with open_uncompressed(path) as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _begins_with_rows(path: Path) -> bool:
    """Whether a file begins with an array of objects, or its first line that is not empty is an object."""
    with open_uncompressed(path) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        if start[:1] == b"[":
            return start[1:].lstrip()[:1] == b"{"
        if start[:1] != b"{":
            return False
        line, _, rest = start.partition(b"\n")
        if not rest and len(start) > 1:  # a long line
            line = start + file.readline()
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(line), dict)
    return False


def _json(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        line = number + error.lineno - 1 if isinstance(error, json.JSONDecodeError) else number
        raise UserError(f"{path}:{line}: not JSON ({problem})") from None


def _row(value: Any, path: Path, number: int) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{path}:{number}: a JSON object is expected on every line, not {type(value).__name__}")
    row = Row(value=value, path=path, line=number)
    if (
        name := next((name for name, item in value.items() if not _is_text(name) or not _is_text(item)), None)
    ) is not None:
        raise row.error(f"{name!r} has a lone surrogate escape, which is not text; remove it")
    return row


def _is_text(value: Any) -> bool:
    """Whether every string in a JSON value, however deep, can be encoded as UTF-8 (no lone surrogates)."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            if not each.isascii() and any("\ud800" <= character <= "\udfff" for character in each):
                return False
        elif isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list):
            waiting += each
    return True


def lines_before(piece: Piece) -> int:
    """Number of lines before the piece, for line numbers in errors."""
    if piece.start == 0:
        return 0
    count, left = 0, piece.start
    with piece.path.open("rb") as file:
        while left:
            block = file.read(min(left, 1 << 20))
            count += block.count(b"\n")
            left -= len(block)
    return count


def _inner_suffix(path: Path) -> str:
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


@contextlib.contextmanager
def open_uncompressed(path: Path) -> Iterator[IO[bytes]]:
    """The file's uncompressed bytes."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield file  # type: ignore[misc]
        elif suffix == ".zst":
            with path.open("rb") as raw:
                yield open_frames(raw)
        else:
            with path.open("rb") as file:
                yield file
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: damaged or truncated compressed file ({error})") from None
    except zlib.error as error:
        raise UserError(f"{path}: damaged compressed file ({error})") from None
