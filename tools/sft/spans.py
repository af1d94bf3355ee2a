"""Token ids of a conversation and the mask of its assistant tokens, from the chat template.

A template with `{% generation %}` marks the assistant tokens itself. For other templates, the conversation before each
assistant turn is rendered with the generation prompt. This text must be a prefix of the full rendering, which is checked;
the assistant turn follows it and ends at the next turn.

The end-of-turn token is part of the turn: a model that is not trained on it never stops.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.data.chat_template import check_tools_rendered, render
from shared.errors import UserError
from tools.sft.conversations import Conversation

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the pattern of transformers
Spans = list[tuple[int, int]]  # [start, end) in characters of the rendered text


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One conversation."""

    ids: npt.NDArray[np.int32]  # [tokens]
    assistant: npt.NDArray[np.bool_]  # [tokens], True for assistant tokens


class Renderer:
    """Renders and tokenises conversations."""

    def __init__(self, tokenizer: Any) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise UserError("--tokenizer: it has no chat template (chat_template.jinja); add the one of its model")
        self._tokenizer = tokenizer
        self._special = np.array(sorted(tokenizer.all_special_ids), np.int64)
        self.marked = GENERATION_TAG.search(tokenizer.chat_template) is not None

    def tokens(self, conversation: Conversation) -> Tokens:
        """Render and tokenise.

        Raises:
            ValueError: the template rejects the conversation or drops its tools, or assistant turns cannot be located.
        """
        messages, tools = conversation.messages, conversation.tools
        check_tools_rendered(self._tokenizer, messages, tools, add_generation_prompt=False)
        text, spans = self._marked(conversation) if self.marked else self._by_prefix(conversation)
        ids, offsets = self._encode(text, [])
        # At inference the prompt ends where a turn starts, so no token crosses that position. If the tokenizer would merge
        # across it (e.g. two line ends), the text is cut there.
        joined = [start for start, _ in spans if start and not (offsets[:, 1] == start).any()]
        if joined:
            ids, offsets = self._encode(text, joined)
        assistant = np.zeros(len(ids), bool)
        for start, end in spans:
            self._mark(assistant, ids, offsets, text, start, end)
        return Tokens(ids=ids.astype(np.int32), assistant=assistant)

    def _encode(self, text: str, cuts: list[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ids `[tokens]` and character ranges `[tokens, 2]`; the text is encoded piecewise between the cuts."""
        ids, offsets = [], []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            # The chat template writes all special tokens.
            encoded = self._tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
            ids.append(np.array(encoded["input_ids"], np.int64))
            offsets.append(np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2) + start)
        return np.concatenate(ids), np.concatenate(offsets)

    def _marked(self, conversation: Conversation) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template

        tokenizer = self._tokenizer
        try:
            rendered, marks = render_jinja_template(
                conversations=[conversation.messages],
                tools=conversation.tools,
                chat_template=tokenizer.chat_template,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
        except Exception as error:  # templates raise jinja's errors and Python's
            raise ValueError(f"the chat template refuses it ({_first_line(error)})") from error
        return rendered[0], list(marks[0])

    def _by_prefix(self, conversation: Conversation) -> tuple[str, Spans]:
        messages = conversation.messages
        text = self._render(conversation, len(messages))
        spans: Spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._prompt(conversation, index, text)
            if not text.startswith(prompt):
                raise ValueError(
                    f"message {index}: the chat template is not prefix-stable: this message changes how earlier ones are "
                    "rendered, so assistant tokens cannot be located; add {% generation %} blocks to the template"
                )
            upto = self._render(conversation, index + 1)
            if text.startswith(upto):
                end = len(upto)
            else:  # e.g. the template drops the reasoning of earlier turns: the turn ends with its content
                content = str(message["content"]).strip()
                found = text.find(content, len(prompt)) if content else -1
                if found < 0:
                    raise ValueError(
                        f"message {index}: the chat template rewrites the assistant's content, so it cannot be found in "
                        "the conversation; add {% generation %} blocks to the template"
                    )
                end = found + len(content)
            spans.append((len(prompt), end))
        return text, spans

    def _prompt(self, conversation: Conversation, index: int, text: str) -> str:
        """The model's input before message `index`."""
        if index:
            return self._render(conversation, index, add_generation_prompt=True)
        # No earlier message, and templates reject an empty conversation: derive the generation prompt from another one.
        anyone = Conversation(messages=[{"role": "user", "content": "."}])
        opening = self._render(anyone, 1, add_generation_prompt=True).removeprefix(self._render(anyone, 1))
        return text[: text.find(opening) + len(opening)] if opening in text else opening

    def _render(self, conversation: Conversation, count: int, *, add_generation_prompt: bool = False) -> str:
        messages = conversation.messages[:count]
        return render(self._tokenizer, messages, conversation.tools, add_generation_prompt=add_generation_prompt)

    def _mark(
        self,
        assistant: npt.NDArray[np.bool_],
        ids: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        text: str,
        start: int,
        end: int,
    ) -> None:
        """Mark the tokens of one turn, including its end-of-turn token.

        Byte-level tokenizers may trim white space from offsets. A white-space token then has an empty range [p, p); it is
        inside if start < p <= end.
        """
        first, last = offsets[:, 0], offsets[:, 1]
        inside = np.flatnonzero((last > start) & ((first < end) | (last <= end)))
        if not len(inside):
            return
        low, high = int(inside[0]), int(inside[-1]) + 1
        closing = low + np.flatnonzero(np.isin(ids[low:high], self._special))[-1:]
        if len(closing) and not text[offsets[closing[0], 1] : end].strip():
            high = int(closing[0]) + 1  # without the line end that some templates write after it
        elif high < len(ids) and ids[high] in self._special:
            high += 1
        assistant[low:high] = True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
