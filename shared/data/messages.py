"""Messages of a conversation as data sets spell them: roles and content, or ShareGPT's from and value; and tool definitions."""

from __future__ import annotations

import json
from typing import Any

from shared.data.sources import Row

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of an assistant message, one meaning
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def message(row: Row, place: str, entry: Message) -> Message:
    """A message with 'role', text 'content' and, if it has any, 'tool_calls'; text parts are joined.

    Args:
        row: the row, for errors.
        place: the message's name in errors.
        entry: the message as written. Empty fields are left out, arguments of tool calls become objects, and OpenAI's
            first spelling (function_call, role function) becomes its later one.

    Raises:
        UserError: an unknown role, or content that is not text.
    """
    entry = {name: value for name, value in entry.items() if value is not None and (name != "tool_calls" or value)}
    if "function_call" in entry:
        entry["tool_calls"] = [{"type": "function", "function": entry.pop("function_call")}]
    if entry.get("role") == "function":
        entry["role"] = "tool"
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise row.error(f"{place}: role {role!r} is none of {', '.join(ROLES)}")
    if isinstance(content, list):  # OpenAI content parts
        content = _join(row, place, content)
    if "tool_calls" in entry:
        if role != "assistant":
            raise row.error(f"{place} ({role}): only assistant messages have tool_calls")
        entry["tool_calls"] = _tool_calls(row, place, entry["tool_calls"])
        content = content or ""
    if not isinstance(content, str):
        raise row.error(f"{place} ({role}): content is {type(content).__name__}, not text")
    return entry | {"content": content}


def sharegpt_message(row: Row, place: str, entry: Message) -> Message:
    """A message from 'from' and 'value'. UserError for an unknown 'from', or a value that is not text."""
    said = str(entry.get("from"))
    role, value = SHAREGPT_ROLES.get(said), entry.get("value")
    if role is None:
        raise row.error(f"{place}: 'from' {entry.get('from')!r} is none of {', '.join(SHAREGPT_ROLES)}")
    if isinstance(value, list):
        value = _join(row, place, value)
    if not isinstance(value, str):
        raise row.error(f"{place}: 'value' is not text")
    further = {"weight": entry["weight"]} if entry.get("weight") is not None else {}
    if said != "function_call":
        return {"role": role, "content": value, **further}
    called = _json(row, f"{place}: the value of a function_call", value)
    calls = _tool_calls(row, place, called if isinstance(called, list) else [called])
    return {"role": role, "content": "", "tool_calls": calls, **further}


def any_message(row: Row, place: str, entry: Message) -> Message:
    """A message in either spelling."""
    return (sharegpt_message if "from" in entry and "role" not in entry else message)(row, place, entry)


def entries(row: Row, key: str) -> list[Message]:
    """The objects of a list in a row, or of JSON text of one. UserError if it is not a list of objects."""
    found = row.value[key]
    if isinstance(found, str) and found.lstrip().startswith("["):
        found = _json(row, repr(key), found)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise row.error(f"{key!r} is not a list of objects")
    return found


def conversation_messages(row: Row, key: str) -> list[Message]:
    """The messages of a list in a row, after the row's 'system' column if it has one. Either spelling.

    Raises:
        UserError: a message cannot be read; there are two system texts.
    """
    opening = system(row)
    spelling = "turn" if key == "conversations" else "message"
    said = [any_message(row, f"{spelling} {number}", entry) for number, entry in enumerate(entries(row, key))]
    if opening and said and said[0]["role"] in ("system", "developer"):
        if said[0]["content"] == opening[0]["content"]:
            return said
        raise row.error(f"'system' and the first message of {key!r} are two system texts; leave one out")
    return [*opening, *said]


def sharegpt(row: Row) -> list[Message]:
    """'system' and 'conversations' of a row."""
    return conversation_messages(row, "conversations")


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


def prompt_completion(row: Row) -> list[Message]:
    """'system', 'prompt' and 'completion' of a row: texts of user and assistant, or lists of messages."""
    said: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.value.get(key)
        if isinstance(value, str):
            said.append({"role": role, "content": value})
        elif key not in row.value:
            raise row.error(f"no key {key!r} beside the other of prompt and completion")
        else:
            said += [any_message(row, f"{key} {number}", entry) for number, entry in enumerate(entries(row, key))]
    return [*system(row), *said]


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
        tools = _json(row, "'tools'", tools)
    if not tools and isinstance(functions := row.value.get("functions"), list):  # OpenAI's first spelling
        tools = [{"type": "function", "function": function} for function in functions]
    if not tools:
        return None
    if not isinstance(tools, list):
        raise row.error("'tools' is not a list")
    tools = [_json(row, "'tools'", tool) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise row.error("'tools' is not a list of objects")
    return tools


def _tool_calls(row: Row, place: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls as OpenAI writes them, with arguments that are objects (or texts that are none)."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise row.error(f"{place}: a tool call needs a function with a name and arguments")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except ValueError:
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        outer = call if "function" in call else {}
        found.append({"type": "function", **outer, "function": {**function, "arguments": arguments}})
    return found


def _json(row: Row, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise row.error(f"{name} is not JSON") from None


def _join(row: Row, place: str, parts: list[Any]) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise row.error(f"{place}: only text parts are supported in content")
    return "".join(part["text"] for part in parts)
