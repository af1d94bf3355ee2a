"""Prompts: lines of a jsonl file, checked, and their token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from shared.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the input."""

    line: int  # counted from 1
    fields: dict[str, Any]

    @property
    def prompt(self) -> str | list[dict[str, Any]]:
        """Raw text, or the messages of a conversation."""
        return self.fields["messages"] if "messages" in self.fields else self.fields["prompt"]


def read_rows(path: Path, reserved: tuple[str, ...]) -> list[Row]:
    """The lines of a jsonl file that are not blank.

    Args:
        path: the file.
        reserved: fields that the output adds; an input with one of them is refused.

    Raises:
        UserError: names the file and the line.
    """
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    rows.append(Row(line=number, fields=_parse(text, f"--prompts {path}:{number}", reserved)))
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not rows:
        raise UserError(f"--prompts {path} holds no prompt")
    return rows


def _parse(text: str, place: str, reserved: tuple[str, ...]) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f'{place}: an object like {{"prompt": "..."}} is wanted, not {type(fields).__name__}')
    if ("prompt" in fields) == ("messages" in fields):
        raise UserError(f'{place}: give either "prompt" or "messages"')
    prompt = fields.get("prompt", fields.get("messages"))
    if isinstance(prompt, list):
        for message in prompt:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise UserError(f'{place}: every message needs "role" and "content"')
        if not prompt:
            raise UserError(f"{place}: the list of messages is empty")
    elif not isinstance(prompt, str) or "messages" in fields:
        raise UserError(f'{place}: "prompt" is a text and "messages" a list, not {type(prompt).__name__}')
    for name in reserved:
        if name in fields:
            raise UserError(f'{place}: the output adds a field "{name}"; rename the input\'s')
    return fields


def load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory."""
    from transformers import AutoTokenizer

    try:
        # by default transformers asks at a terminal whether to run remote code
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        if "trust_remote_code" in str(error):
            line = (
                "it is remote code in the directory, which is not run; save the tokenizer as tokenizer.json, with "
                "tokenizer_class PreTrainedTokenizerFast in tokenizer_config.json"
            )
        raise UserError(f"--source {source}: its tokenizer cannot be loaded: {line}") from None


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]], place: str) -> list[int]:
    """Token ids of a prompt: raw text tokenized as it is, messages through the chat template with a generation prompt."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        if not ids:
            raise UserError(f"{place}: the prompt is empty and the tokenizer adds no BOS token; write a first word")
        return ids
    if not tokenizer.chat_template:
        raise UserError(f"{place}: messages need a chat template and the tokenizer has none; give a raw prompt instead")
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{place}: the chat template refuses these messages: {error}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_length(ids: list[int], context: int, place: str) -> None:
    """UserError if the prompt fills the context."""
    if len(ids) >= context:
        raise UserError(
            f"{place}: the prompt has {len(ids)} tokens and the context {context}; shorten it, or give a larger "
            "--max-model-len if the model allows it"
        )
