"""Reads files of conversations as tokens, for `sft prepare` and `sft preview`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.data.chat_template import read_template, template_arguments
from shared.data.sources import Piece, Row, expand, may_hold_rows, reason, rows
from shared.data.tokenizer import open_tokenizer
from shared.errors import UserError
from tools.sft.conversations import Conversation, conversation
from tools.sft.options import ReadingOptions
from tools.sft.spans import Renderer, Tokens


def row_files(paths: tuple[Path, ...], *, split: str | None, flag: str) -> list[Path]:
    """The files of rows. UserError for a file that holds none by its name."""
    files = expand(paths, flag=flag, split=split, rows_only=True)
    for file in files:
        if not may_hold_rows(file):
            raise UserError(
                f"{flag} {file}: conversations are JSON lines (.jsonl, also .gz, .zst), .json, .parquet or .arrow"
            )
    return files


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A row that is set aside."""

    path: Path
    line: int
    reason: str
    row: Any
    """The row as it was read, or its text if that was no JSON object."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """A conversation and its tokens."""

    row: Row
    conversation: Conversation
    tokens: Tokens


class Reader:
    """Reads pieces of files as tokens.

    Args:
        hf_files: the directory of the tokenizer.
        options: the command's.
    """

    def __init__(self, hf_files: Path, options: ReadingOptions) -> None:
        self.tokenizer = open_tokenizer(hf_files)
        self.options = options
        if options.messages_column is not None and options.format != "auto":
            raise UserError(
                f"--format {options.format} and --messages-column both say where the messages are; leave one out"
            )
        self.chat_template = read_template(options.chat_template) if options.chat_template else None
        if self.chat_template is not None:
            self.tokenizer.chat_template = self.chat_template
        self.arguments = template_arguments(options.template_argument)
        self.renderer = Renderer(
            self.tokenizer,
            arguments=self.arguments,
            spans=options.spans,
            only_last=options.assistant_only_last,
        )

    def read(self, piece: Piece) -> Iterator[Read | Reject]:
        """Every row of a piece, in order; rejects only with `--on-error set-aside`.

        Raises:
            UserError: a row cannot be read or rendered; the message has file and line.
        """
        aside = self.options.on_error == "set-aside"
        waiting: list[Reject] = []

        def reject(line: int, why: str, found: Any) -> None:
            waiting.append(Reject(path=piece.path, line=line, reason=why, row=found))

        for row in rows(piece, reject=reject if aside else None):
            yield from waiting
            waiting.clear()
            try:
                yield self._read(row)
            except UserError as error:
                if not aside:
                    raise
                yield Reject(path=row.path, line=row.line, reason=reason(error, row.path), row=row.value)
        yield from waiting

    def _read(self, row: Row) -> Read:
        conversed = conversation(row, self.options.format, self.options.messages_column)
        try:
            tokens = self.renderer.tokens(conversed)
        except ValueError as error:
            raise row.error(str(error)) from error
        if not tokens.assistant.any():
            raise row.error("the chat template marks no assistant tokens; check its {% generation %} blocks")
        return Read(row=row, conversation=conversed, tokens=tokens)
