"""Windows over text whose likelihood is measured: bits per byte of files, the same for every engine.

A document's tokens, without special tokens of the tokenizer, follow one prefix token: its BOS token, or its EOS token where it
has none. Every token of the document is predicted once. The first window predicts up to `window` tokens; each further one the
next `stride` tokens, and it reads the `window` tokens before the last of them. So a predicted token has at least
`window - stride` tokens before it. With `stride = window` these are lm-evaluation-harness's windows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.data.sources import Piece, expand, texts
from shared.errors import UserError

_WINDOW = 2048  # tokens, default; limited by the model's context
_SPARE = 2  # positions of the context that vLLM needs: one of what precedes the text, one that it generates


@dataclass(frozen=True, kw_only=True)
class Window:
    """One forward pass."""

    document: int
    inputs: list[int]  # token ids, at most `window`
    targets: list[int]  # the tokens that follow the last `len(targets)` inputs


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text: a file, or a row of one."""

    file: str  # name of its file
    number: int  # in its file, from 0
    text: str
    tokens: list[int]

    @property
    def utf8_bytes(self) -> int:
        return len(self.text.encode())

    @property
    def words(self) -> int:
        """As lm-evaluation-harness counts them."""
        return len(re.split(r"\s+", self.text))


def checked_window(window: int | None, stride: int | None, context: int) -> tuple[int, int]:
    """Window and stride of the flags --window and --stride. UserError if they do not fit the model's context."""
    most = context - _SPARE
    if window is not None and window > most:
        raise UserError(f"--window {window}: the model's context of {context} tokens takes windows up to {most}")
    size = window or min(most, _WINDOW)
    if stride is not None and stride > size:
        raise UserError(f"--stride {stride} is longer than the window of {size} tokens: tokens would be left out")
    return size, stride or size


def read_documents(paths: Sequence[Path], text_key: str, tokenizer: Any) -> list[Document]:
    """Tokenised texts: a text file is one document, a JSON-lines file one a row; empty ones are left out.

    Args:
        paths: files and folders.
        text_key: key of the text in rows.
        tokenizer: of transformers.

    Raises:
        UserError: a file cannot be read; two have one name; there is no text.
    """
    files = expand(paths, flag="--text")
    names = [file.name for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--text: two files are called {twice}, the name of their result; give one at a time")
    documents = []
    for file in files:
        for number, text in enumerate(texts(Piece(path=file, start=0, end=file.stat().st_size), text_key)):
            if tokens := tokenizer(text, add_special_tokens=False)["input_ids"]:
                documents.append(Document(file=file.name, number=number, text=text, tokens=tokens))
    if without := [name for name in names if not any(document.file == name for document in documents)]:
        raise UserError(f"--text: {without[0]} has no text")
    return documents


def prefix_token(tokenizer: Any) -> int:
    """The token before each document. UserError if the tokenizer has neither BOS nor EOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        "--source: its tokenizer names neither a bos_token nor an eos_token, of which one precedes each text"
    )


def windows_of(documents: Sequence[Document], prefix: int, window: int, stride: int) -> Iterator[Window]:
    """The windows of all documents, in order."""
    for index, document in enumerate(documents):
        stream, count = [prefix, *document.tokens], len(document.tokens)
        done = 0
        while done < count:
            end = min(done + (stride if done else window), count)
            yield Window(document=index, inputs=stream[max(end - window, 0) : end], targets=stream[done + 1 : end + 1])
            done = end
