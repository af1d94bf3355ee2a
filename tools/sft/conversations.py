"""Conversations in the forms of published data sets, read as lists of messages.

messages   {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}       (OpenAI, Hugging Face)
sharegpt   {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}
alpaca     {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["...", "..."]]}
prompt     {"prompt": "...", "completion": "..."}, texts or lists of messages                    (OpenAI, TRL)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shared.data.messages import Message, alpaca, conversation_messages, prompt_completion, tool_definitions
from shared.data.sources import Row
from tools.sft.options import Format

Kind = Literal["messages", "sharegpt", "alpaca", "prompt"]
KEYS: dict[Kind, str] = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
    "prompt": "prompt",
}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in order, and the tool definitions for the chat template."""

    messages: list[Message]
    tools: list[Any] | None = None
    untrained: frozenset[int] = frozenset()
    """Numbers of assistant messages without a loss: their `weight` is 0."""


def conversation(row: Row, form: Format, column: str | None = None) -> Conversation:
    """Read one row; `column` holds its messages, whatever its form.

    Raises:
        UserError: the row does not have the format; the message has file and line.
    """
    if column is not None:
        if column not in row.value:
            raise row.error(f"no key {column!r}, which --messages-column names (it has: {_keys(row)})")
        messages = conversation_messages(row, column)
    else:
        kind = _detect(row) if form == "auto" else form
        if KEYS[kind] not in row.value:
            raise row.error(f"no key {KEYS[kind]!r}, which --format {kind} wants")
        if kind == "alpaca":
            messages = _alpaca(row)
        elif kind == "prompt":
            messages = prompt_completion(row)
        else:
            messages = conversation_messages(row, KEYS[kind])
    tools = tool_definitions(row)
    if not any(said["role"] == "assistant" and _says_something(said) for said in messages):
        raise row.error("no assistant message with content in this conversation: no token has a loss")
    untrained = frozenset(number for number, said in enumerate(messages) if _without_loss(row, number, said))
    messages = [{name: value for name, value in said.items() if name != "weight"} for said in messages]
    return Conversation(messages=messages, tools=tools, untrained=untrained)


def _without_loss(row: Row, number: int, said: Message) -> bool:
    """Whether OpenAI's `weight` of a message is 0."""
    weight = said.get("weight", 1)
    if weight not in (0, 1):
        raise row.error(f"message {number}: weight {weight!r} is neither 0 (no loss) nor 1")
    return said["role"] == "assistant" and not weight


def _detect(row: Row) -> Kind:
    for kind, key in KEYS.items():
        if key in row.value:
            return kind
    raise row.error(
        f"none of {', '.join(KEYS.values())} is a key of this row (it has: {_keys(row)}); see --format and "
        "--messages-column"
    )


def _keys(row: Row) -> str:
    return ", ".join(list(row.value)[:8])


def _alpaca(row: Row) -> list[Message]:
    asked, output = alpaca(row), row.value.get("output") or ""
    if not isinstance(output, str):
        raise row.error("output must be text")
    return [*asked, {"role": "assistant", "content": output}]


def _says_something(said: Message) -> bool:
    return bool(said["content"] or said.get("tool_calls"))
