"""Tokenizers of checkpoint directories: opening, copying, hashing."""

from __future__ import annotations

from pathlib import Path
from shutil import copyfile
from typing import Any

import xxhash

from shared.errors import UserError

# Files of a Hugging Face tokenizer; a directory has some of them.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer's files in a directory, in a fixed order."""
    return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]


def tokenizer_hash(directory: Path) -> str:
    """Hash of names and contents of the tokenizer's files, the chat template included."""
    digest = xxhash.xxh3_128()
    for file in tokenizer_files(directory):
        content = file.read_bytes()
        digest.update(f"{file.name}\0{len(content)}\0".encode())
        digest.update(content)
    return f"xxh3_128:{digest.hexdigest()}"


def copy_tokenizer(directory: Path, target: Path) -> None:
    """Copy the tokenizer's files into the new directory `target`."""
    target.mkdir()
    for file in tokenizer_files(directory):
        copyfile(file, target / file.name)


def open_tokenizer(directory: Path, *, flag: str = "--tokenizer", needs_eos: bool = True) -> Any:
    """The directory's tokenizer as a fast `transformers` tokenizer.

    Raises:
        UserError: the directory has no tokenizer, no fast tokenizer, or, with `needs_eos`, no EOS token.
    """
    import os

    # Work is parallel over processes; tokenizer threads in each would oversubscribe the cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not tokenizer_files(directory):
        raise UserError(f"{flag} {directory}: no tokenizer in it (no tokenizer.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a damaged directory
        raise UserError(f"{flag} {directory}: not a readable tokenizer ({str(error).splitlines()[0]})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{flag} {directory}: {type(tokenizer).__name__} has no fast form (tokenizer.json)")
    if needs_eos and tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {directory}: no eos_token in tokenizer_config.json, so documents cannot be ended")
    return tokenizer
