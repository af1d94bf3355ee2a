"""`sft preview`: conversations with the tokens that have a loss in colour, in the terminal or as a page."""

from __future__ import annotations

import html as escaping
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.open import open_checkpoint
from shared.cli import log
from shared.data.sources import Piece
from shared.errors import UserError
from tools.sft.options import ReadingOptions
from tools.sft.reading import Read, Reader, Reject, row_files
from tools.sft.spans import Tokens

DEFAULT_COUNT = 3
OPEN, CLOSE = "\u27e6", "\u27e7"  # around tokens with a loss, where there is no colour

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>sft preview</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; border: 1px solid #ccc; border-radius: 6px; padding: 1rem; color: #555; background: #fafafa; }
b { font-weight: normal; color: #05400a; background: #c9f0cc; }
.refused { color: #a00; }
@media (prefers-color-scheme: dark) {
  body { background: #161616; color: #ddd; } pre { background: #1e1e1e; border-color: #444; color: #999; }
  b { color: #d6ffd9; background: #14521a; } .refused { color: #ff8a8a; }
}
</style>
<h1>Conversations as the model is trained on them</h1>
<p><b>Tokens with a loss</b>; all other text is context.</p>
"""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One conversation, or a row that is refused."""

    title: str
    stretches: tuple[tuple[bool, str], ...]
    """(whether it has a loss, text), in order."""
    refused: str = ""
    """Why the row is set aside."""


def run(*, source: tuple[Path, ...], tokenizer: Path, reading: ReadingOptions, html: Path | None) -> None:
    """Print the first conversations, or write a page of them.

    Raises:
        UserError: a row cannot be read or rendered; there is none; the page cannot be written.
    """
    files = row_files(source, split=reading.split, flag="--source")
    hf_files = open_checkpoint(tokenizer, kinds=("tokenizer", "hf", "megatron"), flag="--tokenizer").hf_files
    reader = Reader(hf_files, reading)
    shown = list(islice(_shown(reader, files), reading.limit or DEFAULT_COUNT))
    if not shown:
        raise UserError(f"--source {source[0]}: no row in it")
    if html is None:
        _print(shown)
        return
    if not html.parent.is_dir():
        raise UserError(f"--html {html}: {html.parent} is not a directory")
    html.write_text(page(shown), encoding="utf-8")
    log(f"{len(shown)} conversations are shown in {html}")


def _shown(reader: Reader, files: Sequence[Path]) -> Iterator[Shown]:
    for file in files:
        for read in reader.read(Piece(path=file, start=0, end=file.stat().st_size)):
            if isinstance(read, Reject):
                yield Shown(title=f"{read.path}:{read.line}", stretches=(), refused=read.reason)
            else:
                yield shown(reader.tokenizer, read)


def shown(tokenizer: Any, read: Read) -> Shown:
    """A conversation, its tokens decoded in stretches with and without a loss."""
    tokens = read.tokens
    title = f"{read.row.path}:{read.row.line}: {len(tokens.ids)} tokens, {int(tokens.assistant.sum())} with a loss"
    return Shown(title="; ".join([title, *tokens.notes]), stretches=decoded(tokenizer, tokens))


def decoded(tokenizer: Any, tokens: Tokens) -> tuple[tuple[bool, str], ...]:
    """Stretches of tokens with and without a loss, in order: (whether it has a loss, text)."""
    ids, trained = tokens.ids.tolist(), tokens.assistant.tolist()
    return tuple(
        (loss, tokenizer.decode([ids[place] for place in places], clean_up_tokenization_spaces=False))
        for loss, places in groupby(range(len(ids)), key=trained.__getitem__)
    )


def page(conversations: Sequence[Shown]) -> str:
    """An HTML page of conversations; nothing in it is loaded from elsewhere."""
    parts = [_PAGE]
    for one in conversations:
        parts.append(f"<h2>{escaping.escape(one.title)}</h2>\n")
        if one.refused:
            parts.append(f'<p class="refused">set aside: {escaping.escape(one.refused)}</p>\n')
            continue
        texts = (f"<b>{escaping.escape(text)}</b>" if loss else escaping.escape(text) for loss, text in one.stretches)
        parts.append(f"<pre>{''.join(texts)}</pre>\n")
    return "".join([*parts, "</html>\n"])


def _print(conversations: Sequence[Shown]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for one in conversations:
        console.print(Text(one.title, style="bold"))
        if one.refused:
            console.print(Text(f"set aside: {one.refused}", style="red"))
            continue
        text = Text()
        for loss, stretch in one.stretches:
            marked = loss and not console.is_terminal
            text.append(f"{OPEN}{stretch}{CLOSE}" if marked else stretch, style="black on green" if loss else "dim")
        console.print(text)
        console.print()
