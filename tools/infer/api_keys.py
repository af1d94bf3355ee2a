"""`--api-key-file`."""

from __future__ import annotations

from pathlib import Path

from shared.errors import UserError


def api_keys(path: Path) -> list[str]:
    """The keys of a file, a key a line. UserError if it has none."""
    try:
        keys = [line.strip() for line in path.read_text(encoding="ascii").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"--api-key-file {path}: a key is not ASCII, which HTTP headers are") from None
    if not keys:
        raise UserError(f"--api-key-file {path} holds no key; write one a line")
    return keys
