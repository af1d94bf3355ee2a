"""Tokenizers of checkpoint directories: opening, copying, hashing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from shutil import copyfile
from typing import Any

import xxhash

from shared.data.tokenizer_conversion import convert, convertible
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
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
)
NAMED_TEMPLATES = "additional_chat_templates"


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer's files in a directory, in a fixed order, and the named chat templates in its folder of them."""
    named = sorted((directory / NAMED_TEMPLATES).glob("*.jinja"))
    return [*(directory / name for name in TOKENIZER_FILES if (directory / name).is_file()), *named]


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
        place = target / file.relative_to(directory)
        place.parent.mkdir(exist_ok=True)
        copyfile(file, place)


def chat_templates(directory: Path) -> dict[str, str] | None:
    """The chat templates of a directory of tokenizer files, by name; None if there is none.

    Places, as transformers reads them: chat_template.jinja and the folder of named ones, else chat_template.json, else
    tokenizer_config.json, where a list has names.
    """
    found: Any = None
    if (directory / "chat_template.jinja").is_file():
        found = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    else:
        for name in ("chat_template.json", "tokenizer_config.json"):
            if found is None and (directory / name).is_file():
                found = json.loads((directory / name).read_text(encoding="utf-8")).get("chat_template")
    if isinstance(found, list):
        return {str(entry["name"]): str(entry["template"]) for entry in found}
    named = {
        file.stem: file.read_text(encoding="utf-8") for file in sorted((directory / NAMED_TEMPLATES).glob("*.jinja"))
    }
    return ({} if found is None else {"default": str(found)}) | named or None


def set_chat_templates(directory: Path, templates: Mapping[str, str]) -> None:
    """Make these the only chat templates of a directory of tokenizer files."""
    (directory / "chat_template.json").unlink(missing_ok=True)
    for file in (directory / NAMED_TEMPLATES).glob("*.jinja"):
        file.unlink()
    settings = directory / "tokenizer_config.json"
    if settings.is_file() and "chat_template" in (content := json.loads(settings.read_text(encoding="utf-8"))):
        del content["chat_template"]
        settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, text in templates.items():
        place = directory / ("chat_template.jinja" if name == "default" else f"{NAMED_TEMPLATES}/{name}.jinja")
        place.parent.mkdir(exist_ok=True)
        place.write_text(text, encoding="utf-8")


def open_tokenizer(directory: Path, *, flag: str = "--tokenizer", needs_eos: bool = True) -> Any:
    """The directory's tokenizer as a fast `transformers` tokenizer, converted where there is no tokenizer.json.

    Raises:
        UserError: the directory has no tokenizer, no fast tokenizer, or, with `needs_eos`, no EOS token.
    """
    import os

    # Work is parallel over processes; tokenizer threads in each would oversubscribe the cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not tokenizer_files(directory):
        raise UserError(f"{flag} {directory}: no tokenizer in it (no tokenizer.json)")
    if convertible(directory):
        tokenizer = convert(directory, flag=flag)
        templates = chat_templates(directory) or {}
        tokenizer.chat_template = templates.get("default") if set(templates) <= {"default"} else templates
        return _with_eos(tokenizer, directory, flag, needs_eos)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a damaged directory
        raise UserError(f"{flag} {directory}: not a readable tokenizer ({str(error).splitlines()[0]})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{flag} {directory}: {type(tokenizer).__name__} has no fast form (tokenizer.json)")
    return _with_eos(tokenizer, directory, flag, needs_eos)


def _with_eos(tokenizer: Any, directory: Path, flag: str, needs_eos: bool) -> Any:
    if needs_eos and tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {directory}: no eos_token in tokenizer_config.json, so documents cannot be ended")
    return tokenizer
