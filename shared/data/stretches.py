"""Places where a long text may be cut so that its stretches give the ids of the whole: memory is bounded by a stretch."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from shared.data.sources import decode_error
from shared.errors import UserError

# After a line end, before a character other than white space; and before a space between letters. The first holds for the
# patterns of Qwen, Llama 3 and GPT-4, the second for those of GPT-2 too, and for Gemma.
RULES = (r"(?<=\n)(?=\S)", r"(?<=[A-Za-z])(?= [A-Za-z])")
STRETCH_LIMIT = 32 << 20  # characters without such a place: more is no text, and its memory has no bound
_PROBE = (
    "def f(x):\n    return x + 1\n\nclass A:\n\tb = 'c'\n\n\n# d e\nf\nThe quick brown fox doesn't jump. It naps at a door\n"
    "in 1999 or so  and then we go\r\nhome alone\n\n  to eat a b c an in it is of the\n"
)
_SPELLINGS = str.maketrans(
    {"\u0120": " ", "\u2581": " ", "\u010a": "\n"}
)  # of GPT-2's byte alphabet, and of sentencepiece


def cut_of(tokenizer: Any) -> str | None:
    """The pattern of places where this `tokenizers.Tokenizer` lets a text be cut; None if there is none.

    A rule holds if no token of the vocabulary spans such a place, and a probe gives the same ids in stretches. It does not
    for a tokenizer that puts a space before every text, or whose merges go over words.
    """
    whole = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    tokens = [token.translate(_SPELLINGS) for token in tokenizer.get_vocab(with_added_tokens=False)]

    def holds(rule: str) -> bool:
        spanned = any(map(re.compile(rule).search, tokens))
        return not spanned and _ids(tokenizer, re.split(rule, _PROBE)) == whole

    return "|".join(filter(holds, RULES)) or None


def stretches(text: str, cut: str | None, size: int) -> Iterator[str]:
    """The text in stretches of about `size` characters.

    Raises:
        UserError: there is no place to cut in many more.
    """
    start = 0
    if cut is not None:
        pattern = re.compile(cut)
        while len(text) - start > size and (found := pattern.search(text, start + size)):
            yield text[start : found.start()]
            start = found.start()
    yield text[start:]


def file_stretches(file: IO[bytes], path: Path, cut: str, size: int) -> Iterator[str]:
    """The text of an open file in stretches of about `size` characters; as much is in memory.

    Raises:
        UserError: it is not UTF-8 (with the line), or has no place to cut in 32 Mi characters.
    """
    pattern, decoder = re.compile(cut), codecs.getincrementaldecoder("utf-8")()
    kept, lines, first = "", 1, True
    while True:
        block = file.read(size)
        at_end = not block
        if first:
            block, first = block.removeprefix(codecs.BOM_UTF8), False
        try:
            kept += decoder.decode(block, final=at_end)
        except UnicodeDecodeError as error:
            raise decode_error(error, path, lines) from None
        lines += block.count(b"\n")
        if at_end:
            break
        start = 0
        while len(kept) - start > size and (found := pattern.search(kept, start + size)):
            yield kept[start : found.start()]
            start = found.start()
        kept = kept[start:]
        if len(kept) > STRETCH_LIMIT:
            raise UserError(
                f"{path}:{lines}: {len(kept) >> 20} Mi characters without a space between words or a line end, which is no "
                "text; leave the file out"
            )
    yield kept


def _ids(tokenizer: Any, texts: list[str]) -> list[int]:
    return [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids]
