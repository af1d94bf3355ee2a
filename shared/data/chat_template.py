"""Chat templates: conversations as text. A template that drops the tools of a row is refused, not used."""

from __future__ import annotations

import contextlib
from typing import Any


def render(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, *, add_generation_prompt: bool
) -> str:
    """The conversation as the tokenizer's chat template writes it.

    Raises:
        ValueError: the template refuses the messages.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except Exception as error:  # templates raise jinja's errors and Python's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the chat template refuses these messages: {reason}") from error


def render_prompt(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
    """The conversation with the generation prompt: a model's input.

    Raises:
        ValueError: the template refuses the messages, or does not render the tools.
    """
    check_tools_rendered(tokenizer, messages, tools, add_generation_prompt=True)
    return render(tokenizer, messages, tools, add_generation_prompt=True)


def check_tools_rendered(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, *, add_generation_prompt: bool
) -> None:
    """ValueError if the template writes the same text with and without the tools: the model would not see them."""
    if not tools:
        return
    text, without = render(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt), None
    with contextlib.suppress(ValueError):  # a template that fails without tools does render them
        without = render(tokenizer, messages, None, add_generation_prompt=add_generation_prompt)
    if text == without:
        raise ValueError(
            "the chat template does not render 'tools', so the model would not see them; leave them out, or describe "
            "them in a message"
        )
