"""Vocabulary and special tokens from tokenizer files, without the tokenizers library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.errors import UserError

_VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


def check_same_vocabulary(adapter: Path, base: Path, rows: int) -> None:
    """Compare the adapter's tokenizer with the base's.

    Raises:
        UserError: a token id differs, or is not below `rows`, the embedding's row count.
    """
    ours, theirs = adapter / "tokenizer.json", base / "tokenizer.json"
    fix = f"remove the tokenizer from {adapter} to keep the base's, or merge into the base that it was trained with"
    if not ours.is_file() or not theirs.is_file():
        for name in ("tokenizer.json", *_VOCABULARIES):
            if (adapter / name).is_file() and (
                not (base / name).is_file() or (adapter / name).read_bytes() != (base / name).read_bytes()
            ):
                raise UserError(
                    f"{adapter / name} differs from the base's, with no tokenizer.json to compare ids; {fix}"
                )
        return
    here, there = _vocabulary(_object(ours), ours), _vocabulary(_object(theirs), theirs)
    if beyond := sorted((token for token, place in here.items() if place >= rows), key=here.__getitem__):
        raise UserError(
            f"{ours}: {len(beyond)} tokens beyond the base's {rows} embeddings ({beyond[0]!r}); resize them in the base, save it "
            f"and merge into that, or remove the tokenizer from {adapter}"
        )
    if other := [token for token, place in there.items() if here.get(token) != place]:
        raise UserError(
            f"{ours}: token {other[0]!r} is {here.get(other[0], 'missing')}, in the base {there[other[0]]}; {fix}"
        )


def tokenizer_fields(directory: Path) -> dict[str, Any]:
    """`vocab_size` and special token ids.

    Raises:
        UserError: tokenizer.json is missing, or a special token is not in it.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"--tokenizer {directory} holds no tokenizer.json")
    content = _object(path)
    ids = _vocabulary(content, path)
    fields: dict[str, Any] = {"vocab_size": max(ids.values()) + 1}
    settings = directory / "tokenizer_config.json"
    named = _object(settings) if settings.is_file() else {}
    for role in ("bos", "eos", "pad"):
        token = named.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and text not in ids:
            raise UserError(f"{settings}: {role}_token {text!r} is not in tokenizer.json")
        fields[f"{role}_token_id"] = None if text is None else ids[text]
    return fields


def _vocabulary(content: dict[str, Any], path: Path) -> dict[str, int]:
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [[piece, score], ...]
            vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        ids = {str(piece): int(index) for piece, index in (vocabulary | added).items()}
        if not ids:
            raise ValueError("it is empty")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has no vocabulary: {error}") from None
    return ids


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content
