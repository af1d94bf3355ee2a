"""Messages of a conversation as data sets spell them: roles and content, or ShareGPT's from and value; and tool definitions."""

from __future__ import annotations

import json
from typing import Any

from shared.data.sources import Row

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
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


def message(row: Row, place: str, entry: Message) -> Message:
    """A message with 'role' and text 'content'; text parts are joined.

    Args:
        row: the row, for errors.
        place: the message's name in errors.
        entry: the message as written.

    Raises:
        UserError: an unknown role, or content that is not text.
    """
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise row.error(f"{place}: role {role!r} is none of {', '.join(ROLES)}")
    if isinstance(content, list):  # OpenAI content parts
        content = _join(row, place, content)
    if content is None and role == "assistant" and entry.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise row.error(f"{place} ({role}): content is {type(content).__name__}, not text")
    return entry | {"content": content}


def sharegpt_message(row: Row, place: str, entry: Message) -> Message:
    """A message from 'from' and 'value'. UserError for an unknown 'from', or a value that is not text."""
    role = SHAREGPT_ROLES.get(str(entry.get("from")))
    if role is None:
        raise row.error(f"{place}: 'from' {entry.get('from')!r} is none of {', '.join(SHAREGPT_ROLES)}")
    if not isinstance(entry.get("value"), str):
        raise row.error(f"{place}: 'value' is not text")
    return {"role": role, "content": entry["value"]}


def entries(row: Row, key: str) -> list[Message]:
    """The objects of a list in a row. UserError if it is not a list of objects."""
    found = row.value[key]
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise row.error(f"{key!r} is not a list of objects")
    return found


def sharegpt(row: Row) -> list[Message]:
    """'system' and 'conversations' of a row."""
    said = entries(row, "conversations")
    return [*system(row), *(sharegpt_message(row, f"turn {number}", entry) for number, entry in enumerate(said))]


def alpaca(row: Row) -> list[Message]:
    """'system', 'history', and 'instruction' with 'input', of a row; the last message is the user's."""
    messages = system(row)
    for number, turn in enumerate(row.value.get("history") or []):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise row.error(f"history {number} is not a pair of texts")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    instruction, extra = (row.value.get(key) or "" for key in ("instruction", "input"))
    if not all(isinstance(text, str) for text in (instruction, extra)):
        raise row.error("instruction and input must be text")
    return [*messages, {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}]


def system(row: Row) -> list[Message]:
    """The system message of a row's 'system' column, if it has one."""
    text = row.value.get("system")
    if text is not None and not isinstance(text, str):
        raise row.error("'system' is not text")
    return [{"role": "system", "content": text}] if text else []


def tool_definitions(row: Row) -> list[Any] | None:
    """The 'tools' of a row: a list of objects, or JSON text of it as in table columns; None without tools.

    Raises:
        UserError: 'tools' is neither.
    """
    tools = row.value.get("tools")
    if isinstance(tools, str) and tools:
        tools = _json(row, tools)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise row.error("'tools' is not a list")
    tools = [_json(row, tool) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise row.error("'tools' is not a list of objects")
    return tools


def _json(row: Row, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise row.error("'tools' is not JSON") from None


def _join(row: Row, place: str, parts: list[Any]) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise row.error(f"{place}: only text parts are supported in content")
    return "".join(part["text"] for part in parts)
