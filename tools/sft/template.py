"""A tokenizer's chat template as `sft prepare` uses it: its variables, its tokens, and what it wants of messages."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from shared.data.chat_template import render, tools_rendered
from shared.data.messages import Message
from shared.errors import UserError


class Template:
    """Renders conversations, always with the same variables.

    Args:
        tokenizer: of transformers, with a chat template or a set of named ones.
        arguments: variables of the template, such as `enable_thinking`.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "--tokenizer: it has no chat template (chat_template.jinja); add the one of its model, or give one with "
                "--chat-template"
            )
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise UserError(f"--tokenizer: its chat templates ({names}) have no default; give one with --chat-template")
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        sources = tokenizer.chat_template
        text = "\n".join(sources.values()) if isinstance(sources, dict) else sources
        for name in self.arguments:
            if not re.search(rf"\b{name}\b", text):
                raise UserError(f"--template-argument {name}: the chat template has no such variable; leave it out")
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self.special = _any_of(special)
        self.added = _any_of({token.content for token in added if token.content.strip()} | special)
        self._ignores_prompt: bool | None = None

    def source(self, tools: list[Any] | None) -> str:
        """The Jinja text used for a conversation: named templates have one for tools."""
        return str(self.tokenizer.get_chat_template(tools=tools))

    def render(self, messages: list[Message], tools: list[Any] | None, *, add_generation_prompt: bool = False) -> str:
        """The rendered text. ValueError if the template refuses the messages."""
        return render(
            self.tokenizer,
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            arguments=self.arguments,
        )

    def adapted(self, messages: list[Message], tools: list[Any] | None) -> tuple[list[Message], list[str]]:
        """The messages as this template takes them, and what was done, in words.

        `developer`, OpenAI's newer name, becomes `system` for a template that does not know it. Arguments of tool calls
        are objects, as in most templates, or JSON text for one that writes them as they are.
        """
        done = []
        if any(said["role"] == "developer" for said in messages) and "developer" not in self.source(tools):
            messages = [said | {"role": "system"} if said["role"] == "developer" else said for said in messages]
            done.append("role developer is rendered as system, which the chat template knows")
        arguments = [call["function"]["arguments"] for call in _calls(messages)]
        objects = [value for value in arguments if isinstance(value, dict) and value]
        if objects:
            try:
                text = self.render(messages, tools)
                as_text = any(repr(value) in text and repr(value) != json.dumps(value) for value in objects)
            except ValueError:
                as_text = True
            if as_text:
                done.append("arguments of tool calls are given as JSON text, which the chat template writes as it is")
                messages = [_with_text_arguments(said) for said in messages]
        if not tools_rendered(self.tokenizer, messages, tools, add_generation_prompt=False, arguments=self.arguments):
            done.append("the chat template does not render 'tools', so the model does not see them")
        return messages, done

    def closing(self, here: str, other: str | None, *, called: bool, special: bool) -> int | None:
        """Length of the text that ends a turn, through the token that does; None if no such token ends it.

        What the template writes after a turn whether or not another follows is the end of the turn:

            here   <|end_of_answer|><|end_of_turn|>\\n<|user|>  ...        other  <|end_of_answer|><|end_of_turn|>\\n
                                                 ^
        Some write another token after the last turn, or none after any; then the first token ends it.

        Args:
            here: the text after the assistant's, to the end of the conversation.
            other: the same where the conversation ends there, or goes on; None if the template refuses that.
            called: the turn ends with tool calls, whose punctuation comes before its end.
            special: look for tokens flagged special; else for any added token, or a text.
        """
        tokens = self.special if special else self.added
        common = os.path.commonprefix([here, other or ""])
        if common and not self.ignores_prompt:
            ends = [found.end() for found in tokens.finditer(here) if found.end() <= len(common)]
            if ends:
                return ends[-1]
        first = tokens.search(here)
        if first and (called or not here[: first.start()].strip()):
            return first.end()
        if special or other is None:
            return None
        shorter, longer = sorted((here.rstrip(), other.rstrip()), key=len)  # a word that is no token of its own
        return len(shorter) if shorter.strip() and longer.startswith(shorter) else None

    @property
    def ignores_prompt(self) -> bool:
        """Whether the template writes the same with and without a generation prompt (it has none, or always writes it)."""
        if self._ignores_prompt is None:
            asked = [{"role": "user", "content": "."}]
            try:
                texts = [self.render(asked, None, add_generation_prompt=prompt) for prompt in (False, True)]
                self._ignores_prompt = texts[0] == texts[1]
            except ValueError:
                self._ignores_prompt = False
        return self._ignores_prompt


def _calls(messages: list[Message]) -> list[dict[str, Any]]:
    return [call for said in messages for call in said.get("tool_calls") or []]


def _with_text_arguments(said: Message) -> Message:
    if not said.get("tool_calls"):
        return said
    calls = [
        call | {"function": call["function"] | {"arguments": _as_text(call["function"]["arguments"])}}
        for call in said["tool_calls"]
    ]
    return said | {"tool_calls": calls}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _any_of(contents: set[str]) -> re.Pattern[str]:
    """A pattern of any of these texts, the longest first; without any, one that is found nowhere."""
    words = sorted((content for content in contents if content), key=lambda content: (-len(content), content))
    return re.compile("|".join(map(re.escape, words)) or r"(?!)")
