"""Tools of a row reach the model or are refused; errors of a template are one line."""

from pathlib import Path
from typing import Any

import jinja2
import pytest

from shared.data.chat_template import (
    check_tools_rendered,
    read_template,
    render,
    render_prompt,
    template_arguments,
    with_defaults,
)
from shared.errors import UserError

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


def test_arguments_of_a_template() -> None:
    given = template_arguments(["enable_thinking=false", "n=3", "date=1 May", 'name="x"', "a=b=c"])
    assert given == {"enable_thinking": False, "n": 3, "date": "1 May", "name": "x", "a": "b=c"}
    for words, problem in (
        (["enable_thinking"], "write NAME=VALUE"),
        (["a b=1"], "write NAME=VALUE"),
        (["messages=1"], "messages is set by the command itself"),
        (["a=1", "a=2"], "--template-argument a is given twice"),
    ):
        with pytest.raises(UserError, match=problem):
            template_arguments(words)


def test_defaults_render_as_arguments_do() -> None:
    template = "{{ flag }} {{ text }} {{ many }} {{ nothing }}"
    arguments = {"flag": False, "text": 'say "\u00e9"\n', "many": [{"a": None}, 1.5], "nothing": None}
    expected = jinja2.Template(template).render(**arguments)
    assert jinja2.Template(with_defaults(template, arguments)).render() == expected
    assert jinja2.Template(with_defaults(template, arguments)).render(flag=True).startswith("True say")


def test_a_template_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ messages }}\n")
    assert read_template(path) == "{{ messages }}\n"
    path.write_text("one\n{% for %}")
    with pytest.raises(UserError, match=r"--chat-template .*t\.jinja:2: not a Jinja template"):
        read_template(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        read_template(path)
