"""Tools of a row reach the model or are refused; errors of a template are one line."""

from typing import Any

import pytest

from shared.data.chat_template import check_tools_rendered, render, render_prompt

TALK = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


class Template:
    """A tokenizer whose chat template is a function of messages and tools."""

    def __init__(self, write: Any) -> None:
        self.write = write

    def apply_chat_template(self, messages: Any, *, tools: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        return self.write(messages, tools) + ("<bot>" if add_generation_prompt else "")


def wants_tools(messages: Any, tools: Any) -> str:
    if tools is None:
        raise KeyError("tools")
    return "tools"


def refuses(messages: Any, tools: Any) -> str:
    raise TypeError("no\nsystem message")


@pytest.mark.parametrize("write", [lambda messages, tools: f"{tools}", wants_tools])
def test_tools_are_rendered(write: Any) -> None:
    assert render_prompt(Template(write), TALK, TOOLS) == write(TALK, TOOLS) + "<bot>"


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_a_template_that_drops_tools_is_refused(add_generation_prompt: bool) -> None:
    plain = Template(lambda messages, tools: messages[0]["content"])
    for tools in (None, []):
        check_tools_rendered(plain, TALK, tools, add_generation_prompt=add_generation_prompt)
    assert render_prompt(plain, TALK, None) == "hi<bot>"
    with pytest.raises(ValueError, match="the chat template does not render 'tools'"):
        check_tools_rendered(plain, TALK, TOOLS, add_generation_prompt=add_generation_prompt)
    with pytest.raises(ValueError, match="the chat template does not render 'tools'"):
        render_prompt(plain, TALK, TOOLS)


def test_what_a_template_refuses_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^the chat template refuses these messages: no$"):
        render(Template(refuses), TALK, None, add_generation_prompt=True)
