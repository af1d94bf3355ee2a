"""docs/troubleshooting.md quotes the code's messages verbatim."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/troubleshooting.md"
GAP = "…"
NOT_OURS = ("torch.OutOfMemoryError",)  # the message of a library


def quoted() -> list[str]:
    """The code spans that begin a row of a table."""
    rows = re.findall(r"^\| `([^`]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [text for text in rows if text not in NOT_OURS]


@cache
def texts() -> tuple[str, ...]:
    """Every string of shared/ and tools/, with a gap for each value of an f-string."""
    found = []
    for folder in ("shared", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            if ".venv" not in path.parts:
                nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                found += [text for node in nodes if (text := text_of(node))]
    return tuple(found)


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) or GAP for value in node.values)
    return ""


def occurs(quote: str) -> bool:
    """Whether one string of the code has the quote's words, in order, whatever stands in its gaps."""
    # Without gaps at the ends, which say nothing: a search for ".*words" tries every place of a text, to its end.
    first, *others = quote.strip(GAP).split(GAP)
    pattern = re.compile(".*".join(map(re.escape, (first, *others))), re.DOTALL)
    return any(pattern.search(text) for text in texts() if first in text)


@pytest.mark.parametrize("quote", quoted())
def test_a_quoted_message_is_in_the_code(quote: str) -> None:
    assert occurs(quote), f"{PAGE.name} quotes {quote!r}, which no string of shared/ or tools/ says"


def test_a_message_that_is_not_in_the_code_is_found_out() -> None:
    assert not occurs("--target … holds the result of … with other inputs; choose another planet")
    assert len(quoted()) > 25
