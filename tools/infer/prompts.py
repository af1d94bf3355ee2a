"""Prompts: read, check and tokenise the rows of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.data.chat_template import render_prompt
from shared.data.messages import tool_definitions
from shared.data.sources import Row, rows_of
from shared.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Messages = list[dict[str, Any]]
TEMPLATE_ARGUMENTS = "chat_template_kwargs"  # of a row


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of the input."""

    row: Row
    place: str  # file and line, for error messages
    fields: dict[str, Any]

    @property
    def prompt(self) -> str | Messages:
        """Raw text, or the messages of a conversation."""
        return self.fields["messages"] if "messages" in self.fields else self.fields["prompt"]

    @property
    def tools(self) -> list[Any] | None:
        """Tool definitions for the chat template."""
        return self.fields.get("tools") or None

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Further variables of the chat template, under the name that vLLM's API gives them."""
        return self.fields.get(TEMPLATE_ARGUMENTS) or {}


def read_prompts(path: Path, reserved: tuple[str, ...]) -> list[Prompt]:
    """The rows of a file, JSON lines, a JSON array, parquet or arrow, or of a folder of them.

    Args:
        path: the file or folder.
        reserved: fields that the output adds; an input row must not have them.

    Raises:
        UserError: a row is invalid; the message has file and line.
    """
    found = [_checked(row, reserved) for row in rows_of(path, flag="--prompts")]
    if not found:
        raise UserError(f"--prompts {path} holds no prompt")
    return found


def _checked(row: Row, reserved: tuple[str, ...]) -> Prompt:
    fields, place = dict(row.value), f"--prompts {row.path}:{row.line}"
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
    if not isinstance(fields.get(TEMPLATE_ARGUMENTS) or {}, dict):
        raise UserError(f'{place}: "{TEMPLATE_ARGUMENTS}" is an object, such as {{"enable_thinking": false}}')
    if tools := tool_definitions(row):  # JSON text in table columns
        fields["tools"] = tools
    try:
        json.dumps(fields)
    except TypeError as error:
        raise UserError(f"{place}: a field cannot be copied into JSON ({error}); leave the column out") from None
    return Prompt(row=row, place=place, fields=fields)


def load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory."""
    from transformers import AutoTokenizer

    try:
        # Without this argument transformers prompts on a terminal for permission to run remote code.
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        if "trust_remote_code" in str(error):
            line = (
                "it is remote code in the directory, which is not run; save the tokenizer as tokenizer.json, with "
                "tokenizer_class PreTrainedTokenizerFast in tokenizer_config.json"
            )
        raise UserError(f"--source {source}: its tokenizer cannot be loaded: {line}") from None


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    place: str,
    tools: list[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt: raw text unchanged, messages rendered by the chat template with a generation prompt.

    Args:
        tokenizer: the model's.
        prompt: text or messages.
        place: file and line, for error messages.
        tools: tool definitions. UserError if the chat template does not render them.
        arguments: further variables of the chat template; without effect on raw text.
    """
    if isinstance(prompt, str):
        if tools:
            raise UserError(f'{place}: "tools" are rendered by the chat template; give "messages" instead of "prompt"')
        ids = tokenizer(prompt)["input_ids"]
        if not ids:
            raise UserError(f"{place}: the prompt is empty and the tokenizer adds no BOS token; write a first word")
        return ids
    if not tokenizer.chat_template:
        raise UserError(f"{place}: messages need a chat template and the tokenizer has none; give a raw prompt instead")

    try:
        text = render_prompt(tokenizer, prompt, tools, arguments)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_length(ids: list[int], context: int, place: str) -> None:
    """UserError if the prompt fills the context."""
    if len(ids) >= context:
        raise UserError(
            f"{place}: the prompt has {len(ids)} tokens and the context {context}; shorten it, or give a larger "
            "--max-model-len if the model allows it"
        )
