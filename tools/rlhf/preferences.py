"""Preference rows in the forms of published data sets, read as a prompt with two replies.

explicit   {"prompt": text or messages, "chosen": reply, "rejected": reply}
implicit   {"chosen": conversation, "rejected": conversation}: messages, or text with "\\n\\nHuman:" and "\\n\\nAssistant:"
           (anthropic-hh); a column "prompt" may repeat what the conversations begin with (ultrafeedback)
sharegpt   {"conversations": [...], "chosen": {"from": "gpt", "value": reply}, "rejected": ...}      (LLaMA-Factory)
alpaca     {"instruction": text, "input": text, "chosen": reply, "rejected": reply}                 (LLaMA-Factory)
           {"instruction": text, "input": text, "output": [chosen, rejected]}

Replies with a label, true or false, under "label" or (LLaMA-Factory) "kto_tag":

explicit   {"prompt": text or messages, "completion": reply, "label": true}
implicit   {"completion" or "messages": conversation that ends with the reply, "label": false}
           {"conversations": [...], "kto_tag": true}                                             (LLaMA-Factory)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shared.data.messages import Message, alpaca, message, sharegpt, sharegpt_message
from shared.data.sources import Row

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_SIDES = ("chosen", "rejected")
_LABELS = ("label", "kto_tag")
_REPLIES = ("completion", "messages", "conversations")
# Columns that hold a question in published data sets: next to bare replies they are a prompt under another name.
_QUESTIONS = ("question", "query", "input", "user", "context", "text", "messages", "source")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One side of a preference: the model's input, and the reply that is scored."""

    prompt: str | list[Message]
    text: str


def preference(row: Row) -> tuple[Reply, Reply]:
    """The chosen and the rejected reply of a row, each with its prompt.

    Conversations that part before their last reply have different prompts: each is scored at its own last reply.

    Raises:
        UserError: the row has none of the forms, or can be read in two ways; the message names file, line and columns.
    """
    columns = row.value
    if "instruction" in columns and "prompt" not in columns and isinstance(columns.get("output"), list):
        if any(side in columns for side in _SIDES):
            raise row.error("'output' is a list and there is 'chosen' or 'rejected': which are the replies?")
        if len(columns["output"]) != 2 or not all(isinstance(text, str) for text in columns["output"]):
            raise row.error("'output' is not a list of two texts, the chosen and the rejected reply")
        columns = columns | dict(zip(_SIDES, columns["output"], strict=True))
    for key in _SIDES:
        if key not in columns:
            raise row.error(f"no column {key!r} (the row has: {', '.join(columns) or 'nothing'})")
    prompts: dict[str, Callable[[Row], Any]] = {
        "prompt": _given_prompt,
        "conversations": _sharegpt_prompt,
        "instruction": alpaca,
    }
    named = [key for key in prompts if key in columns]
    if len(named) > 1:
        raise row.error(f"{' and '.join(map(repr, named))} both hold a prompt; leave one out")
    sides = [_side(row, key, columns[key]) for key in _SIDES]
    if isinstance(sides[0], str) != isinstance(sides[1], str) and not all(_is_reply(side) for side in sides):
        raise row.error("'chosen' is a text and 'rejected' messages, or the reverse; give both alike")
    prompt = prompts[named[0]](row) if named else None
    if prompt is not None and all(_is_reply(side) for side in sides):
        replies = [
            side if isinstance(side, str) else _last(row, key, side) for key, side in zip(_SIDES, sides, strict=True)
        ]
        if isinstance(prompt, str) and prompt and all(reply.startswith(prompt) for reply in replies):
            raise row.error("'chosen' and 'rejected' both begin with 'prompt': is it part of them? Leave it out of one")
        return Reply(prompt=prompt, text=replies[0]), Reply(prompt=prompt, text=replies[1])
    chosen, rejected = sides
    if isinstance(chosen, str) or isinstance(rejected, str):
        return _from_texts(row, prompt, str(chosen), str(rejected))
    return _from_messages(row, prompt, chosen, rejected)


def labelled(row: Row) -> list[tuple[Reply, bool]]:
    """The replies of a row with their labels: one, or the two of a preference.

    Raises:
        UserError: the row has none of the forms, or can be read in two ways; the message names file, line and columns.
    """
    columns = row.value
    labels = [key for key in _LABELS if key in columns]
    if not labels and any(side in columns for side in (*_SIDES, "output")):
        return list(zip(preference(row), (True, False), strict=True))
    if len(labels) != 1:
        has = f"both {' and '.join(map(repr, labels))}" if labels else "no column 'label', nor 'chosen' and 'rejected'"
        raise row.error(f"{has} (the row has: {', '.join(columns) or 'nothing'})")
    if any(side in columns for side in _SIDES):
        raise row.error(f"{labels[0]!r} beside 'chosen' or 'rejected': is it one reply or two? Leave one out")
    label = columns[labels[0]]
    if label not in (True, False):  # 0 and 1, too
        raise row.error(f"{labels[0]!r} is {label!r}; give true for a desirable reply and false for another")
    return [(_labelled_reply(row), bool(label))]


def _labelled_reply(row: Row) -> Reply:
    named = [key for key in _REPLIES if key in row.value]
    if len(named) != 1:
        what = f"both {' and '.join(map(repr, named))}" if named else "no column 'completion' or 'messages'"
        raise row.error(f"{what} (the row has: {', '.join(row.value) or 'nothing'})")
    key = named[0]
    said = _side(row, key, row.value[key])
    if "prompt" in row.value:
        if not _is_reply(said):
            raise row.error(f"{key!r} is a conversation and there is 'prompt'; give one reply, or leave 'prompt' out")
        return Reply(prompt=_given_prompt(row), text=said if isinstance(said, str) else _last(row, key, said))
    if isinstance(said, str):
        raise row.error(f"no column 'prompt' to the text in {key!r}")
    if len(said) < 2:
        raise row.error(f"{key!r} is a reply alone; give 'prompt', or the conversation that it ends")
    return Reply(prompt=said[:-1], text=_last(row, key, said))


def _given_prompt(row: Row) -> str | list[Message]:
    prompt = row.value["prompt"]
    return prompt if isinstance(prompt, str) else messages(row, "prompt")


def _sharegpt_prompt(row: Row) -> list[Message]:
    found = sharegpt(row)
    if not found:
        raise row.error("'conversations' is empty")
    return found


def messages(row: Row, key: str) -> list[Message]:
    """A column of messages. UserError if it has another type, is empty, or a message is malformed."""
    return _messages(row, key, row.value[key])


def _messages(row: Row, key: str, value: Any) -> list[Message]:
    if not (isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)):
        raise row.error(f"{key!r} is neither a text nor a list of messages with 'role' and 'content'")
    return [
        (sharegpt_message if "from" in entry else message)(row, f"{key!r}, message {number}", entry)
        for number, entry in enumerate(value)
    ]


def _side(row: Row, key: str, value: Any) -> str | list[Message]:
    return value if isinstance(value, str) else _messages(row, key, [value] if isinstance(value, dict) else value)


def _is_reply(side: str | list[Message]) -> bool:
    """Whether a side holds a reply only, no conversation."""
    return not side.startswith(_HUMAN) if isinstance(side, str) else len(side) == 1 and side[0]["role"] == "assistant"


def _last(row: Row, key: str, said: list[Message]) -> str:
    if said[-1]["role"] != "assistant":
        raise row.error(f"{key!r} ends with a message of the {said[-1]['role']}, not with the assistant's reply")
    if said[-1].get("tool_calls"):
        raise row.error(f"{key!r} ends with tool calls; a reply is scored as text")
    return str(said[-1]["content"])


def _from_messages(
    row: Row, prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> tuple[Reply, Reply]:
    if isinstance(prompt, list):
        if chosen[: len(prompt)] != prompt or rejected[: len(prompt)] != prompt:
            if any(said["role"] != "assistant" for said in (chosen[0], rejected[0])):
                raise row.error("'chosen' and 'rejected' are conversations that do not begin with the row's prompt")
            chosen, rejected = [*prompt, *chosen], [*prompt, *rejected]
    elif chosen[0] != rejected[0]:
        raise row.error("'chosen' and 'rejected' begin with different messages, so they are no replies to one prompt")
    else:
        shared = [one for one, other in zip(chosen[:-1], rejected[:-1], strict=False) if one == other]
        if not any(one["role"] == "user" for one in shared):
            raise row.error("'chosen' and 'rejected' share no message of the user, so there is no prompt")
        if isinstance(prompt, str) and prompt.strip() not in [one["content"].strip() for one in shared]:
            raise row.error("'prompt' is no message of the conversations in 'chosen' and 'rejected'; leave one out")
    first, second = (
        Reply(prompt=side[:-1], text=_last(row, key, side))
        for key, side in zip(_SIDES, (chosen, rejected), strict=True)
    )
    return first, second


def _from_texts(row: Row, prompt: str | list[Message] | None, chosen: str, rejected: str) -> tuple[Reply, Reply]:
    if not (chosen.startswith(_HUMAN) or rejected.startswith(_HUMAN)):
        return _from_bare_texts(row, chosen, rejected)
    replies = []
    for key, text in zip(_SIDES, (chosen, rejected), strict=True):
        at = text.rfind(_ASSISTANT)
        if at < 0 or not text.startswith(_HUMAN) or _HUMAN in text[at:]:
            raise row.error(
                f"{key!r} is no conversation of '\\n\\nHuman:' and '\\n\\nAssistant:' that ends with the assistant's reply"
            )
        replies.append(Reply(prompt=text[: at + len(_ASSISTANT)], text=text[at + len(_ASSISTANT) :]))
    question = chosen.partition(_ASSISTANT)[0]
    if question != rejected.partition(_ASSISTANT)[0]:
        raise row.error("'chosen' and 'rejected' begin with different questions, so they are no replies to one prompt")
    if prompt is not None and not (
        isinstance(prompt, str) and all(prompt.strip() in reply.prompt for reply in replies)
    ):
        raise row.error("'prompt' is not in the conversations of 'chosen' and 'rejected'; leave one out")
    return replies[0], replies[1]


def _from_bare_texts(row: Row, chosen: str, rejected: str) -> tuple[Reply, Reply]:
    """Texts without a prompt column: they are whole texts if they begin alike. The whole text is one sequence."""
    if others := [name for name in _QUESTIONS if row.value.get(name)]:
        raise row.error(f"no column 'prompt'; if {others[0]!r} is the prompt, rename it (else leave it out)")
    if chosen.split()[:1] != rejected.split()[:1]:
        raise row.error("no column 'prompt', and 'chosen' and 'rejected' do not begin with a common one")
    return Reply(prompt="", text=chosen), Reply(prompt="", text=rejected)
