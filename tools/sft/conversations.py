"""Conversations in three JSON-lines formats, read as lists of messages.

messages   {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}       (OpenAI, Hugging Face)
sharegpt   {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}
alpaca     {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["...", "..."]]}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from shared.data.sources import Row

Format = Literal["auto", "messages", "sharegpt", "alpaca"]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
KEYS = {"messages": "messages", "sharegpt": "conversations", "alpaca": "instruction"}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


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
    messages = {"messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca}[kind](row)
    tools = row.value.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError:
            raise row.error("'tools' is not JSON") from None
    if tools and not isinstance(tools, list):
        raise row.error("'tools' is not a list")
    if not any(message["role"] == "assistant" and _says_something(message) for message in messages):
        raise row.error("no assistant message with content in this conversation: no token has a loss")
    return Conversation(messages=messages, tools=tools or None)


def _detect(row: Row) -> Literal["messages", "sharegpt", "alpaca"]:
    for kind, key in KEYS.items():
        if key in row.value:
            return kind  # type: ignore[return-value]
    keys = ", ".join(list(row.value)[:8])
    raise row.error(f"none of {', '.join(KEYS.values())} is a key of this row (it has: {keys}); see --format")


def _messages(row: Row) -> list[Message]:
    return [_message(row, number, entry) for number, entry in enumerate(_entries(row, "messages"))]


def _message(row: Row, number: int, entry: Message) -> Message:
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise row.error(f"message {number}: role {role!r} is none of {', '.join(ROLES)}")
    if isinstance(content, list):  # OpenAI content parts
        content = _join(row, number, content)
    if content is None and role == "assistant" and entry.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise row.error(f"message {number} ({role}): content is {type(content).__name__}, not text")
    return entry | {"content": content}


def _join(row: Row, number: int, parts: list[Any]) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise row.error(f"message {number}: only text parts are supported in content")
    return "".join(part["text"] for part in parts)


def _sharegpt(row: Row) -> list[Message]:
    messages = _system(row)
    for number, entry in enumerate(_entries(row, "conversations")):
        role = SHAREGPT_ROLES.get(str(entry.get("from")))
        if role is None:
            raise row.error(f"turn {number}: 'from' {entry.get('from')!r} is none of {', '.join(SHAREGPT_ROLES)}")
        if not isinstance(entry.get("value"), str):
            raise row.error(f"turn {number}: 'value' is not text")
        messages.append({"role": role, "content": entry["value"]})
    return messages


def _alpaca(row: Row) -> list[Message]:
    messages = _system(row)
    for number, turn in enumerate(row.value.get("history") or []):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise row.error(f"history {number} is not a pair of texts")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    instruction, extra, output = (row.value.get(key) or "" for key in ("instruction", "input", "output"))
    if not all(isinstance(text, str) for text in (instruction, extra, output)):
        raise row.error("instruction, input and output must be text")
    asked = f"{instruction}\n\n{extra}" if extra else instruction
    return [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": output}]


def _system(row: Row) -> list[Message]:
    system = row.value.get("system")
    if system is not None and not isinstance(system, str):
        raise row.error("'system' is not text")
    return [{"role": "system", "content": system}] if system else []


def _entries(row: Row, key: str) -> list[Message]:
    entries = row.value[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise row.error(f"{key!r} is not a list of objects")
    return entries


def _says_something(message: Message) -> bool:
    return bool(message["content"] or message.get("tool_calls"))
