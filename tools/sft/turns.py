"""Where the assistant's turns lie in the rendering of a chat template that does not mark them.

A turn begins where the model's prompt ends at inference, and ends with the token that ends it. Positions are found by
sentinels: a message's text is replaced by a word that occurs nowhere else, the conversation is rendered again, and what
stands around the word must be what stands around the text. So a text that also occurs in a header, that the template
trims, or before which other text appears once the conversation goes on, is found in the one place that it has:

    full       <|system|>s<|end|><|user|>q<|end|><|assistant|>it is<|end|><|user|> ...
    sentinel   <|system|>s<|end|><|user|>q<|end|><|assistant|>#<|end|><|user|> ...      around: before | after
    prompt     <|system|>s<|end|><|user|>#<|end|><|assistant|>                          after # : the generation prompt

What disagrees is refused with its reason: a wrong mask does not show in a loss curve.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.data.messages import REASONING, Message
from tools.sft.template import Template

SENTINEL = "Zq7xSentinelWk9"  # letters and digits: no template trims, escapes or splits it
_CLOSED_THOUGHT = re.compile(r".*</think>\s*", re.DOTALL)
# A generation prompt may open, or open and close, a block of thinking that a finished turn does not have.
_THINKING = re.compile(r"(<[^<>]*(think|reason|thought)[^<>]*>\s*)+", re.IGNORECASE)
_LAST_THINKING = re.compile(f"{_THINKING.pattern}$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Around:
    """The rendering before and after the text of one message."""

    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Located:
    """A rendered conversation, and the turns in it."""

    text: str
    spans: list[tuple[int, int]]
    """`[start, end)` in characters of the text, one per turn asked for."""


class Turns:
    """Finds the turns of one conversation.

    Raises (every method):
        ValueError: a turn cannot be made sure of; the message names it.
    """

    def __init__(self, template: Template, messages: list[Message], tools: list[Any] | None) -> None:
        self._template, self._messages, self._tools = template, messages, tools
        self.text = self._render(messages)

    def locate(self, wanted: Sequence[int]) -> Located:
        """The turns of the messages with these numbers."""
        text, spans = self.text, []
        for index in wanted:
            start = self._start(index)
            end, closing = self._end(index)
            spans.append((start, end + len(closing)))
            if closing:  # the last turn, which the template ends with nothing
                text = text[:end] + closing
            if not 0 <= start < end + len(closing) or (len(spans) > 1 and start < spans[-2][1]):
                raise ValueError(f"message {index}: its turn cannot be located in the rendered conversation")
        return Located(text=text, spans=spans)

    def check_fields(self) -> None:
        """ValueError if the template leaves out a field of an assistant message: the model would learn less than was said."""
        for index, message in enumerate(self._messages):
            if message["role"] != "assistant":
                continue
            if message.get("tool_calls"):
                if SENTINEL not in self._render(_with_last_argument(self._messages, index)):
                    raise ValueError(_dropped(index, "tool_calls"))
                if message["content"] and SENTINEL not in self._render(_with_content(self._messages, index)):
                    raise ValueError(_dropped(index, "content beside tool_calls"))
            self._check_reasoning(index, message)

    def _check_reasoning(self, index: int, message: Message) -> None:
        """Templates show the reasoning of the last turn at least, or none at all."""
        fields = [name for name in REASONING if isinstance(message.get(name), str) and message[name].strip()]
        changed = dict(message)
        if fields:
            changed.update(dict.fromkeys(fields, SENTINEL))
        elif (opened := message["content"].partition("<think>")) and opened[1] and "</think>" in opened[2]:
            if not opened[2].partition("</think>")[0].strip():
                return
            changed["content"] = "<think>\n" + SENTINEL + "\n</think>" + opened[2].partition("</think>")[2]
        else:
            return
        shown = self._render([*self._messages[:index], changed])
        if SENTINEL not in shown:
            raise ValueError(_dropped(index, fields[0] if fields else "reasoning in its content"))

    def _render(self, messages: list[Message], *, prompt: bool = False) -> str:
        return self._template.render(messages, self._tools, add_generation_prompt=prompt)

    def _around(self, messages: list[Message], index: int, *, prompt: bool = False) -> Around:
        """What is rendered around the text, or the last tool call's last argument, of a message."""
        called = bool(messages[index].get("tool_calls"))
        changed = (_with_last_argument if called else _with_content)(messages, index)
        parts = self._render(changed, prompt=prompt).split(SENTINEL)
        if len(parts) == 1:
            what = "tool_calls are" if called else f"content ({messages[index]['role']}) is"
            raise ValueError(f"message {index}: the chat template rewrites it or leaves it out: its {what} not found")
        if len(parts) > 2 and not called:
            raise ValueError(f"message {index}: the chat template writes its content {len(parts) - 1} times")
        return Around(before=parts[0], after=parts[-1])

    def _start(self, index: int) -> int:
        """Where the prompt of the model ends."""
        if not index:
            return self._first_start()
        # What follows the message before: in the prompt, and in the whole conversation.
        prompt = self._around(self._messages[:index], index - 1, prompt=True).after
        here = self._around(self._messages, index - 1).after
        if here.startswith(prompt) and self.text.endswith(here[len(prompt) :]):
            return len(self.text) - len(here) + len(prompt)
        # The prompt goes on after the header: it opens a thought, where this turn has none, or an empty one.
        start = self._own_start(index)
        written = self.text[len(self.text) - len(here) : start]
        thought = _LAST_THINKING.search(prompt)
        header = prompt[: thought.start()] if thought else prompt
        empty = written[len(header) :]
        if (
            self.text.endswith(here)
            and thought
            and written.startswith(header)
            and (not empty or (_THINKING.fullmatch(empty) and "</" in empty))
        ):
            return start
        raise ValueError(
            f"message {index}: the model's prompt before it ends with {_tail(prompt)}, the conversation has "
            f"{_tail(written)} there, so it is not sure where its turn begins"
        )

    def _own_start(self, index: int) -> int:
        """Where what is this message's own begins: what differs once another text stands there."""
        plain = {"role": "assistant", "content": ""}
        other = self._around([*self._messages[:index], plain, *self._messages[index + 1 :]], index)
        return len(os.path.commonprefix([self.text, other.before]))

    def _first_start(self) -> int:
        """The start of an assistant's turn that nothing precedes: after the header that other turns have, too."""
        asked: Message = {"role": "user", "content": SENTINEL}
        prompt = self._render([asked], prompt=True).rpartition(SENTINEL)[2]
        thought = _LAST_THINKING.search(prompt)
        header = prompt[: thought.start()] if thought else prompt
        upto = self._own_start(0)
        for cut in range(len(header)):
            if (found := self.text.rfind(header[cut:], 0, upto)) >= 0 and header[cut:].strip():
                start = found + len(header) - cut
                opening = prompt[len(header) :]
                return start + len(opening) if opening and self.text.startswith(opening, start) else start
        raise ValueError("message 0: the assistant speaks first, and the chat template writes no header before it")

    def _end(self, index: int) -> tuple[int, str]:
        """Where the turn ends in the text, and what the template left out there: the token of the next role."""
        messages, last = self._messages, index == len(self._messages) - 1
        around = self._around(messages, index)
        here, called = around.after, bool(messages[index].get("tool_calls"))
        if not called and not (
            self.text.startswith(around.before)
            and self.text.endswith(here)
            and len(around.before) + len(here) <= len(self.text)
        ):
            raise ValueError(
                f"message {index}: the chat template renders its surroundings otherwise when its text changes, so its "
                "turn cannot be located"
            )
        other = self._other_tail(index, last=last)
        length = self._template.closing(here, other, called=called, special=True)
        if length is None and last and other is not None and (called or not here.strip()):
            # Nothing ends the last turn: the token of the next role does, as in earlier turns.
            closing = self._template.closing(other, None, called=called, special=True)
            if closing is not None:
                common = len(os.path.commonprefix([here.rstrip(), other]))
                return len(self.text) - len(here) + common, other[common:closing]
        if length is None:
            length = self._template.closing(here, other, called=called, special=False)
        if length is not None and self.text.endswith(here[length:]):
            return len(self.text) - len(here) + length, ""
        raise ValueError(
            f"message {index}: no token ends its turn ({_tail(here) if here.strip() else 'nothing'} follows it), so the "
            "model would not learn to stop; let the template write one"
        )

    def _other_tail(self, index: int, *, last: bool) -> str | None:
        """What follows the turn's text where the conversation ends with it; for the last turn, where it goes on."""
        with contextlib.suppress(ValueError):
            if not last:
                return self._around(self._messages[: index + 1], index).after
            calls = self._messages[index].get("tool_calls")
            following: Message = {"role": "user", "content": "."}
            if calls:
                name = calls[-1]["function"]["name"]
                following = {"role": "tool", "name": name, "tool_call_id": calls[-1].get("id"), "content": "."}
            return self._around([*self._messages, following], index).after
        return None


def _with_content(messages: list[Message], index: int) -> list[Message]:
    """The messages with a sentinel for the text of one; a thought before the answer stays."""
    message = messages[index]
    thought = _CLOSED_THOUGHT.match(message["content"]) if message["role"] == "assistant" else None
    content = (thought[0] if thought else "") + SENTINEL
    return [*messages[:index], {**message, "content": content}, *messages[index + 1 :]]


def _with_last_argument(messages: list[Message], index: int) -> list[Message]:
    """The messages with a sentinel for the last argument of the last tool call, or for its name if it has none."""
    message = messages[index]
    *calls, last = message["tool_calls"]
    function = dict(last["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, dict) and arguments:
        function["arguments"] = {**arguments, list(arguments)[-1]: SENTINEL}
    elif isinstance(arguments, str) and arguments.strip().strip("{}").strip():
        function["arguments"] = SENTINEL
    else:
        function["name"] = SENTINEL
    changed = {**message, "tool_calls": [*calls, {**last, "function": function}]}
    return [*messages[:index], changed, *messages[index + 1 :]]


def _dropped(index: int, field: str) -> str:
    return (
        f"message {index}: the chat template does not render {field}, so the model would learn an answer without; leave "
        "it out of the data, or give a template that renders it with --chat-template"
    )


def _tail(text: str) -> str:
    return repr(text if len(text) <= 40 else "..." + text[-40:])
