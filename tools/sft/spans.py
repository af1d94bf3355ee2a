"""Token ids of a conversation and the mask of its trained tokens, from the chat template.

Trained is what the model would say in a turn, through the token that ends it: a model that is not trained on that token
never stops. Three ways of finding it (`--spans`):

generation  the template marks it with `{% generation %}`
rendered    the turns are located in the rendered conversation: `turns`
last        what follows the model's prompt before the last answer, nothing else
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.data.messages import Message
from shared.errors import UserError
from tools.sft.conversations import Conversation
from tools.sft.options import Spans
from tools.sft.template import Template
from tools.sft.turns import Located, Turns

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the pattern of transformers


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One conversation."""

    ids: npt.NDArray[np.int32]  # [tokens]
    assistant: npt.NDArray[np.bool_]  # [tokens], True for trained tokens
    ends: frozenset[int]  # ids of the tokens that end a trained turn
    notes: tuple[str, ...] = ()  # what was done to the messages


class Renderer:
    """Renders and tokenises conversations.

    Args:
        tokenizer: of transformers, with a chat template.
        arguments: variables of the template.
        spans: how turns are found; auto: by marks where the template has them.
        only_last: a loss on the last assistant message only.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        arguments: Mapping[str, Any] | None = None,
        spans: Spans = "auto",
        only_last: bool = False,
    ) -> None:
        self.template = Template(tokenizer, arguments)
        self._tokenizer = tokenizer
        self._spans, self._only_last = spans, only_last
        added = tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        visible = special | {number for number, token in added.items() if token.content.strip()}
        self._special, self._added = (np.array(sorted(ids), np.int64) for ids in (special, visible))
        if spans == "generation" and not self._marked(None):
            raise UserError("--spans generation: the chat template has no {% generation %} blocks; leave the flag out")

    @property
    def method(self) -> str:
        """How turns are found without tools, in words, for the manifest."""
        if self._spans == "last":
            return "after the last prompt"
        return "generation marks" if self._by_marks(None) else "located in the rendered text"

    def tokens(self, conversation: Conversation) -> Tokens:
        """Render and tokenise.

        Raises:
            ValueError: the template rejects the conversation or drops a part of an answer, or turns cannot be located.
        """
        tools = conversation.tools
        messages, notes = self.template.adapted(conversation.messages, tools)
        turns = Turns(self.template, messages, tools)
        turns.check_fields()
        wanted = self._wanted(conversation)
        marked = self._by_marks(tools)
        if self._spans == "last":
            located = self._after_last_prompt(turns.text, messages, tools, wanted)
        elif marked:
            located = self._marks(messages, tools, wanted)
        else:
            located = turns.locate(wanted)
        text, spans = located.text, located.spans
        ids, offsets = self._encode(text, [])
        # At inference the prompt ends where a turn starts, so no token crosses that position. If the tokenizer would merge
        # across it (e.g. two line ends), the text is cut there.
        joined = [start for start, _ in spans if start and not (offsets[:, 1] == start).any()]
        if joined:
            ids, offsets = self._encode(text, joined)
        assistant = np.zeros(len(ids), bool)
        ends = set()
        for start, end in spans:
            if inside := self._inside(ids, offsets, text, start, end, marked=marked):
                assistant[slice(*inside)] = True
                ends.add(int(ids[inside[1] - 1]))
        return Tokens(
            ids=ids.astype(np.int32),
            assistant=assistant,
            ends=frozenset(ends & set(self._added.tolist())),
            notes=tuple(notes),
        )

    def _wanted(self, conversation: Conversation) -> list[int]:
        """The numbers of the messages with a loss."""
        every = [number for number, said in enumerate(conversation.messages) if said["role"] == "assistant"]
        wanted = [
            number for number in (every[-1:] if self._only_last else every) if number not in conversation.untrained
        ]
        if not wanted:
            raise ValueError("every assistant message that could have a loss has weight 0")
        return wanted[-1:] if self._spans == "last" else wanted

    def _marked(self, tools: list[Any] | None) -> bool:
        return GENERATION_TAG.search(self.template.source(tools)) is not None

    def _by_marks(self, tools: list[Any] | None) -> bool:
        return self._spans == "generation" or (self._spans == "auto" and self._marked(tools))

    def _encode(self, text: str, cuts: list[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ids `[tokens]` and character ranges `[tokens, 2]`; the text is encoded piecewise between the cuts."""
        ids, offsets = [], []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            # The chat template writes all special tokens.
            encoded = self._tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
            ids.append(np.array(encoded["input_ids"], np.int64))
            offsets.append(np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2) + start)
        return np.concatenate(ids), np.concatenate(offsets)

    def _marks(self, messages: list[Message], tools: list[Any] | None, wanted: list[int]) -> Located:
        from transformers.utils.chat_template_utils import render_jinja_template

        tokenizer = self._tokenizer
        try:
            rendered, marks = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.template.source(tools),
                return_assistant_tokens_mask=True,
                **{**tokenizer.special_tokens_map, **self.template.arguments},
            )
        except Exception as error:  # templates raise jinja's errors and Python's
            raise ValueError(f"the chat template refuses it ({_first_line(error)})") from error
        spans = [(int(start), int(end)) for start, end in marks[0]]
        assistants = [number for number, said in enumerate(messages) if said["role"] == "assistant"]
        if wanted != assistants:
            if len(spans) != len(assistants):
                raise ValueError(
                    f"the chat template has {len(spans)} {{% generation %}} blocks for {len(assistants)} assistant "
                    "messages, so it is not sure which are without a loss; try --spans rendered"
                )
            spans = [span for number, span in zip(assistants, spans, strict=True) if number in wanted]
        return Located(text=rendered[0], spans=spans)

    def _after_last_prompt(
        self, text: str, messages: list[Message], tools: list[Any] | None, wanted: list[int]
    ) -> Located:
        (last,) = wanted
        if last != len(messages) - 1 or not last:
            raise ValueError(f"--spans last: message {last} is not the last one after a question")
        prompt = self.template.render(messages[:last], tools, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise ValueError("--spans last: the conversation does not begin with the prompt before its last message")
        return Located(text=text, spans=[(len(prompt), len(text.rstrip()))])

    def _inside(
        self,
        ids: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        text: str,
        start: int,
        end: int,
        *,
        marked: bool,
    ) -> tuple[int, int] | None:
        """First and one past the last token of one turn, including its end-of-turn token.

        Byte-level tokenizers may trim white space from offsets. A white-space token then has an empty range [p, p); it is
        inside if start < p <= end.
        """
        first, last = offsets[:, 0], offsets[:, 1]
        inside = np.flatnonzero((last > start) & ((first < end) | (last <= end)))
        if not len(inside):
            return None
        low, high = int(inside[0]), int(inside[-1]) + 1
        closing = low + np.flatnonzero(np.isin(ids[low:high], self._special if marked else self._added))[-1:]
        if len(closing) and not text[offsets[closing[0], 1] : end].strip():
            high = int(closing[0]) + 1  # without the line end that some templates write after it
        elif marked and high < len(ids) and ids[high] in self._special:
            high += 1
        return low, high


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
