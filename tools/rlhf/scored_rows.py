"""Rows of `rlhf score`: replies with their prompts, in the forms of preferences, of conversations and of `infer generate`.

{"chosen": ..., "rejected": ...}                in the forms of `preferences`
{"prompt" or "messages": ..., "completion": reply}; also "reply", "response", and "completions", a list
{"messages" or "conversations": [...]}          a conversation that ends with the reply
"""

from __future__ import annotations

from typing import Any

from shared.data.messages import Message, alpaca, sharegpt
from shared.data.sources import Row
from tools.rlhf.preferences import Reply, messages, preference

ADDED = ("reward", "rewards", "reward_chosen", "reward_rejected")
"""Columns that are added to a row."""

_REPLIES = ("completion", "completions", "reply", "response")
_PROMPTS = ("prompt", "messages", "conversations", "instruction")
_CONVERSATIONS = ("messages", "conversations")


def replies_of(row: Row) -> dict[str, list[Reply]]:
    """The replies of a row that are scored, by the column that is added.

    Raises:
        UserError: the row has none of the forms, or can be read in two ways; the message names file, line and columns.
    """
    columns = row.value
    for name in ADDED:
        if name in columns:
            raise row.error(f"there is a column {name!r} already; rename it")
    given = [name for name in _REPLIES if name in columns]
    sides = [name for name in ("chosen", "rejected") if name in columns]
    if sides or (isinstance(columns.get("output"), list) and "instruction" in columns):
        if given:
            raise row.error(f"{given[0]!r} beside a pair: is it one reply or two? Leave one out")
        chosen, rejected = preference(row)
        return {"reward_chosen": [chosen], "reward_rejected": [rejected]}
    if len(given) > 1:
        raise row.error(f"{' and '.join(map(repr, given))} both hold a reply; leave one out")
    prompts = [name for name in _PROMPTS if name in columns]
    if not given:
        return {"reward": [_ended(row, prompts)]}
    if len(prompts) != 1:
        has = f"{' and '.join(map(repr, prompts))} both hold a prompt" if prompts else f"no 'prompt' to {given[0]!r}"
        raise row.error(f"{has} (the row has: {', '.join(columns)})")
    prompt, said = _prompt(row, prompts[0]), columns[given[0]]
    if given[0] != "completions":
        return {"reward": [Reply(prompt=prompt, text=_text(row, given[0], said))]}
    if not isinstance(said, list) or not said:
        raise row.error("'completions' is no list of texts, or an empty one")
    return {"rewards": [Reply(prompt=prompt, text=_text(row, "completions", text)) for text in said]}


def ends(row: Row) -> dict[str, list[bool]]:
    """Whether the replies of a row ended by themselves: all but those that `infer generate` cut (finish_reason length)."""
    reasons = row.value.get("finish_reason")
    return {
        name: [
            (reasons[number] if isinstance(reasons, list) and number < len(reasons) else reasons) != "length"
            for number in range(len(said))
        ]
        for name, said in replies_of(row).items()
    }


def _ended(row: Row, prompts: list[str]) -> Reply:
    """The last reply of a conversation."""
    named = [name for name in prompts if name in _CONVERSATIONS]
    if len(prompts) != 1 or not named:
        raise row.error(
            "no reply to score: give 'chosen' and 'rejected', a prompt with 'completion', or 'messages' that end with the "
            f"assistant's (the row has: {', '.join(row.value) or 'nothing'})"
        )
    said = _conversation(row, named[0])
    last = said[-1]
    if last["role"] != "assistant" or len(said) < 2:
        raise row.error(f"{named[0]!r} does not end with the assistant's reply to a message; give the reply, too")
    if last.get("tool_calls"):
        raise row.error(f"{named[0]!r} ends with tool calls; a reply is scored as text")
    return Reply(prompt=said[:-1], text=str(last["content"]))


def _prompt(row: Row, key: str) -> str | list[Message]:
    if key == "instruction":
        return alpaca(row)
    if key == "prompt" and isinstance(row.value[key], str):
        return row.value[key]
    return _conversation(row, key)


def _conversation(row: Row, key: str) -> list[Message]:
    if key != "conversations":
        return messages(row, key)
    found = sharegpt(row)
    if not found:
        raise row.error("'conversations' is empty")
    return found


def _text(row: Row, key: str, said: Any) -> str:
    """A reply: a text, or one message of the assistant's."""
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    if isinstance(said, dict) and said.get("role") == "assistant":
        said = said.get("content")
    if not isinstance(said, str):
        raise row.error(f"{key!r} is no text and no message of the assistant's")
    return said
