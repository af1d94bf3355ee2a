"""Chat templates: conversations as text. A template that drops the tools of a row is refused, not used."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import UserError

# Names that `apply_chat_template` or every template takes: no argument of a template may have one.
_TAKEN = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("tokenizer_kwargs", "return_assistant_tokens_mask"),
}

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag of transformers, unknown to Jinja


def template_arguments(given: Sequence[str], *, flag: str = "--template-argument") -> dict[str, Any]:
    """`name=value` words as arguments of a template: JSON values (`false`, `3`, `"text"`), anything else as text.

    Raises:
        UserError: a word without a name or a value, a name given twice, or one that the rendering sets itself.
    """
    arguments: dict[str, Any] = {}
    for word in given:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"{flag} {word}: write NAME=VALUE, such as enable_thinking=false")
        if name in _TAKEN:
            raise UserError(f"{flag} {word}: {name} is set by the command itself; leave it out")
        if name in arguments:
            raise UserError(f"{flag} {name} is given twice")
        try:
            arguments[name] = json.loads(text)
        except ValueError:
            arguments[name] = text
    return arguments


def with_defaults(template: str, arguments: Mapping[str, Any]) -> str:
    """The template with these values for variables that a caller does not give: it renders as it did with `arguments`."""
    lines = [
        f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} %}}" for name, value in arguments.items()
    ]
    return "".join(lines) + template


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(name)}: {_literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def read_template(path: Path, *, flag: str = "--chat-template") -> str:
    """The text of a template file. UserError if it is not UTF-8 or not a Jinja template."""
    import jinja2

    try:
        text = path.read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", text))
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path}: not UTF-8; give the text of a Jinja template") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{flag} {path}:{error.lineno}: not a Jinja template ({error.message})") from None
    return text


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    *,
    add_generation_prompt: bool,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the tokenizer's chat template writes it; `arguments`: further variables of the template.

    Raises:
        ValueError: the template refuses the messages.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **(arguments or {})
            )
        )
    except Exception as error:  # templates raise jinja's errors and Python's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the chat template refuses these messages: {reason}") from error


def render_prompt(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """The conversation with the generation prompt: a model's input.

    Raises:
        ValueError: the template refuses the messages, or does not render the tools.
    """
    check_tools_rendered(tokenizer, messages, tools, add_generation_prompt=True, arguments=arguments)
    return render(tokenizer, messages, tools, add_generation_prompt=True, arguments=arguments)


def check_tools_rendered(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    *,
    add_generation_prompt: bool,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """ValueError if the template writes the same text with and without the tools: the model would not see them."""
    if not tools_rendered(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt, arguments=arguments):
        raise ValueError(
            "the chat template does not render 'tools', so the model would not see them; leave them out, or describe "
            "them in a message"
        )


def tools_rendered(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    *,
    add_generation_prompt: bool,
    arguments: Mapping[str, Any] | None = None,
) -> bool:
    """Whether the template writes another text with the tools than without. ValueError if it refuses the messages."""
    if not tools:
        return True
    text = render(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt, arguments=arguments)
    without = None
    with contextlib.suppress(ValueError):  # a template that fails without tools does render them
        without = render(tokenizer, messages, None, add_generation_prompt=add_generation_prompt, arguments=arguments)
    return text != without
