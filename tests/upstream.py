"""Helpers for tests of docs/upstream.md: upstream sources, and the page."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/upstream.md"


def relies_on(ours: str, upstream: Any, *statements: str) -> None:
    """Statements and expressions stand in the source of `upstream`: a function, class or module.

    Layout and comments do not count.

    Args:
        ours: the file of ours that relies on them.
        upstream: of the library.
        statements: Python.
    """
    found = _nodes(upstream)
    missing = [text for text in statements if ast.unparse(_node(text)) not in found]
    assert not missing, f"{_name(upstream)} has no {missing} any more: re-read {ours}, then docs/upstream.md"


def says_nothing_of(ours: str, upstream: Any, *words: str) -> None:
    """The source of `upstream` has none of the words; see `relies_on`."""
    source = inspect.getsource(upstream)
    found = [word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", source)]
    assert not found, f"{_name(upstream)} knows {found} now: re-read {ours}, then docs/upstream.md"


def binds(ours: str, upstream: Any, *arguments: Any, **keywords: Any) -> None:
    """`upstream` takes these arguments; their values do not count. See `relies_on`."""
    try:
        inspect.signature(upstream).bind(*arguments, **keywords)
    except TypeError as error:
        raise AssertionError(f"{_name(upstream)}: {error}: re-read {ours}, then docs/upstream.md") from None


def calls(ours: str, upstream: Any, callee: str, *arguments: str, **keywords: str) -> None:
    """`upstream` calls `callee` with these positional arguments first and with these keywords. See `relies_on`."""
    found = [
        call
        for call in ast.walk(_tree(upstream))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == callee and _fits(call, arguments, keywords)
    ]
    wanted = ", ".join((*arguments, *(f"{name}={value}" for name, value in keywords.items())))
    assert found, f"{_name(upstream)} does not call {callee}({wanted}) any more: re-read {ours}, then docs/upstream.md"


def _fits(call: ast.Call, arguments: tuple[str, ...], keywords: dict[str, str]) -> bool:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    positional = tuple(ast.unparse(argument) for argument in call.args[: len(arguments)])
    return positional == arguments and keywords.items() <= given.items()


def attributes_read(*functions: Any) -> set[str]:
    """Attributes of `self` that the methods read."""
    return _attributes(functions, ast.Load)


def attributes_set(*functions: Any) -> set[str]:
    """Attributes of `self` that the methods assign."""
    return _attributes(functions, ast.Store)


def _attributes(functions: tuple[Any, ...], context: type[ast.expr_context]) -> set[str]:
    nodes = (node for function in functions for node in ast.walk(_tree(function)))
    found = (node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, context))
    return {node.attr for node in found if ast.unparse(node.value) == "self"}


def parameters(function: Any) -> set[str]:
    """Names of a method's parameters."""
    return set(inspect.signature(function).parameters) - {"self"}


@cache
def _tree(upstream: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(upstream))))


@cache
def _nodes(upstream: Any) -> frozenset[str]:
    nodes = ast.walk(_tree(upstream))
    return frozenset(ast.unparse(node) for node in nodes if isinstance(node, ast.stmt | ast.expr))


def _node(text: str) -> ast.AST:
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _name(upstream: Any) -> str:
    module = getattr(upstream, "__module__", "")
    return f"{module}.{getattr(upstream, '__qualname__', upstream.__name__)}".removeprefix(".")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A reach-in of the page."""

    upstream: str
    files: tuple[str, ...]
    """Ours."""
    test: str


def versions() -> dict[str, tuple[str, ...]]:
    """Upstream to the versions that the page was read in: `## name 1.0, 2.0`."""
    headings = re.findall(r"^## ([\w-]+) (\d[^\n]*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: tuple(re.findall(r"[0-9][\w.]*", numbers)) for name, numbers in headings}


def rows() -> list[Row]:
    """The page's tables: what is reached, ours, why there is no seam, what would replace it, test."""
    found = []
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        upstream = section.split()[0]
        for line in re.findall(r"^\| (?!what is reached|---)(.*) \|$", section, re.MULTILINE):
            cells = line.split(" | ")
            assert len(cells) == 5, f"a row of {upstream} has {len(cells)} cells: {line}"
            files = tuple(re.findall(r"`([\w/.]+\.py)`", cells[1]))
            (test,) = re.findall(r"`(\w+)`", cells[4])
            found.append(Row(upstream=upstream, files=files, test=test))
    return found
