"""Token ids from a tokenizer's small files, without running the tokenizer's remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.checkpoint.directory.auxiliary_files import read_config


def token_ids(directory: Path) -> dict[str, int]:
    """Token -> id, from the tokenizer files of a directory; empty without such files.

    Raises:
        UserError: a file is not JSON.
    """
    ids: dict[str, int] = {}
    if (path := directory / "vocab.txt").is_file():  # BERT: one token per line
        ids |= {token: index for index, token in enumerate(path.read_text(encoding="utf-8").split("\n"))}
    if (path := directory / "vocab.json").is_file():
        ids |= read_config(path)
    if (path := directory / "tokenizer.json").is_file():
        ids |= {token["content"]: token["id"] for token in read_config(path).get("added_tokens", ())}
    for index, token in _settings(directory).get("added_tokens_decoder", {}).items():
        ids[token["content"]] = int(index)
    if (path := directory / "added_tokens.json").is_file():
        ids |= read_config(path)
    return ids


def mask_token(directory: Path) -> str:
    """The tokenizer's mask_token."""
    token = _settings(directory).get("mask_token")
    if token is None and (path := directory / "special_tokens_map.json").is_file():
        token = read_config(path).get("mask_token")
    return str(token["content"] if isinstance(token, dict) else token or "[MASK]")


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return read_config(path) if path.is_file() else {}
