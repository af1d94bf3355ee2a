"""Conversations in three JSON-lines formats, read as lists of messages.

messages   {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}       (OpenAI, Hugging Face)
sharegpt   {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}
alpaca     {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["...", "..."]]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shared.data.messages import Message, alpaca, entries, message, sharegpt, tool_definitions
from shared.data.sources import Row

Format = Literal["auto", "messages", "sharegpt", "alpaca"]
KEYS = {"messages": "messages", "sharegpt": "conversations", "alpaca": "instruction"}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in order, and the tool definitions for the chat template."""

    messages: list[Message]
    tools: list[Any] | None = None


def conversation(row: Row, form: Format) -> Conversation:
    """Read one row.

    Raises:
        UserError: the row does not have the format; the message has file and line.
    """
    kind = _detect(row) if form == "auto" else form
    if KEYS[kind] not in row.value:
        raise row.error(f"no key {KEYS[kind]!r}, which --format {kind} wants")
    messages = {"messages": _messages, "sharegpt": sharegpt, "alpaca": _alpaca}[kind](row)
    tools = tool_definitions(row)
    if not any(said["role"] == "assistant" and _says_something(said) for said in messages):
        raise row.error("no assistant message with content in this conversation: no token has a loss")
    return Conversation(messages=messages, tools=tools)


def _detect(row: Row) -> Literal["messages", "sharegpt", "alpaca"]:
    for kind, key in KEYS.items():
        if key in row.value:
            return kind  # type: ignore[return-value]
    keys = ", ".join(list(row.value)[:8])
    raise row.error(f"none of {', '.join(KEYS.values())} is a key of this row (it has: {keys}); see --format")


def _messages(row: Row) -> list[Message]:
    return [message(row, f"message {number}", entry) for number, entry in enumerate(entries(row, "messages"))]


def _alpaca(row: Row) -> list[Message]:
    asked, output = alpaca(row), row.value.get("output") or ""
    if not isinstance(output, str):
        raise row.error("output must be text")
    return [*asked, {"role": "assistant", "content": output}]


def _says_something(said: Message) -> bool:
    return bool(said["content"] or said.get("tool_calls"))
