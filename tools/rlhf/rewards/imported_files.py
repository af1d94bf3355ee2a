"""The Python files that a file imports from its own folder. Standard library only; nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def imported_files(file: Path) -> list[Path]:
    """Files beside `file` that it imports, and those that they import; sorted, without `file`.

    Import statements anywhere in a file count; `importlib` calls do not. A file that does not parse imports nothing.
    """
    root = file.resolve().parent
    found: set[Path] = set()
    unread = [file.resolve()]
    while unread:
        current = unread.pop()
        new = {path for name in _imported_names(current, root) for path in _files(root, name)} - found
        found |= new
        unread += new
    return sorted(found - {file.resolve()})


def _imported_names(file: Path, root: Path) -> Iterator[str]:
    """Absolute module names; for `from a import b` also `a.b`, which may be a module."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    package = file.parent.relative_to(root).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: max(0, len(package) + 1 - node.level)] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}".removeprefix(".") for alias in node.names)


def _files(root: Path, name: str) -> Iterator[Path]:
    """Files that importing a module executes."""
    parts = name.split(".") if name else []
    for length in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:length])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                yield path
