"""Rows of three formats become lists of messages; errors have file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared.data.sources import Row
from shared.errors import UserError
from tools.sft.conversations import Conversation, conversation
from tools.sft.options import Format

EXPECTED = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q\n\ni"},
    {"role": "assistant", "content": "a"},
]
FORMS: dict[Format, dict[str, Any]] = {
    "messages": {
        "messages": [*EXPECTED[:1], {"role": "user", "content": [{"type": "text", "text": "q\n\ni"}]}, EXPECTED[2]]
    },
    "sharegpt": {"system": "s", "conversations": [{"from": "human", "value": "q\n\ni"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"system": "s", "instruction": "q", "input": "i", "output": "a"},
    "prompt": {"system": "s", "prompt": "q\n\ni", "completion": "a"},
}


def _row(value: dict[str, Any]) -> Row:
    return Row(value=value, path=Path("rows.jsonl"), line=7)


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_reads_alike(form: Format) -> None:
    assert conversation(_row(FORMS[form]), form).messages == EXPECTED
    assert conversation(_row(FORMS[form]), "auto").messages == EXPECTED


def test_alpaca_history_comes_first() -> None:
    row = {"instruction": "q", "output": "a", "history": [["q0", "a0"]]}
    assert [m["content"] for m in conversation(_row(row), "auto").messages] == ["q0", "a0", "q", "a"]


def test_tools_are_handed_on_as_a_list_or_as_json() -> None:
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        assert conversation(_row(FORMS["messages"] | {"tools": tools}), "auto").tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("value", "form", "problem"),
    [
        ({"text": "x"}, "auto", "none of messages, conversations, instruction, prompt is a key"),
        ({"messages": []}, "sharegpt", "no key 'conversations', which --format sharegpt wants"),
        ({"messages": "x"}, "auto", "'messages' is not a list"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "auto", "message 0: role 'critic'"),
        ({"messages": [{"role": "user", "content": None}]}, "auto", "content is NoneType, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "auto", "only text parts"),
        ({"messages": [{"role": "user", "content": "x"}]}, "auto", "no assistant message"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
            "auto",
            "no assistant",
        ),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "auto", "turn 0: 'from' 'bot'"),
        ({"conversations": [{"from": "gpt"}]}, "auto", "turn 0: 'value' is not text"),
        ({"instruction": "q", "output": 3}, "auto", "must be text"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "auto", "history 0"),
        (FORMS["messages"] | {"tools": "{"}, "auto", "'tools' is not JSON"),
        ({"prompt": "q"}, "auto", "no key 'completion'"),
        (FORMS["messages"] | {"system": "other"}, "auto", "two system texts"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "auto", "a tool call needs a function"),
        ({"messages": [{"role": "user", "content": "q", "tool_calls": [{}]}]}, "auto", "only assistant messages"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "auto", "weight 0.5 is neither 0"),
    ],
)
def test_a_bad_row_is_named(value: dict[str, Any], form: Format, problem: str) -> None:
    with pytest.raises(UserError, match=r"^rows\.jsonl:7: ") as caught:
        conversation(_row(value), form)
    assert problem in str(caught.value)


def test_either_spelling_stands_under_either_key() -> None:
    messages, turns = EXPECTED, [{"from": "gpt", "value": "a"}]
    assert conversation(_row({"conversations": messages}), "auto").messages == EXPECTED
    assert conversation(_row({"messages": turns}), "auto").messages == EXPECTED[2:]
    assert conversation(_row({"talk": messages, "messages": []}), "auto", "talk").messages == EXPECTED
    assert conversation(_row({"talk": json.dumps(messages)}), "auto", "talk").messages == EXPECTED
    with pytest.raises(UserError, match="no key 'chat', which --messages-column names"):
        conversation(_row({"talk": messages}), "auto", "chat")


def test_prompt_and_completion_may_be_messages() -> None:
    assert conversation(_row({"prompt": EXPECTED[:2], "completion": EXPECTED[2:]}), "auto").messages == EXPECTED


def test_calls_in_every_spelling() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    as_text = {"name": "f", "arguments": '{"x": 1}'}
    for row in (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": as_text}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [as_text]}]},
        {"messages": [{"role": "assistant", "content": None, "function_call": as_text}]},
        {"conversations": [{"from": "function_call", "value": json.dumps(as_text)}]},
    ):
        assert conversation(_row(row), "auto").messages == [{"role": "assistant", "content": "", "tool_calls": [call]}]
    functions = {**FORMS["messages"], "functions": [{"name": "f"}]}
    assert conversation(_row(functions), "auto").tools == [{"type": "function", "function": {"name": "f"}}]


def test_empty_calls_and_tools_are_none() -> None:
    row = {"messages": [{"role": "assistant", "content": "a", "tool_calls": []}], "tools": []}
    assert conversation(_row(row), "auto") == Conversation(messages=[{"role": "assistant", "content": "a"}])


def test_weights_say_what_has_a_loss() -> None:
    said = [{"role": "assistant", "content": "a", "weight": weight} for weight in (0, 1)]
    found = conversation(_row({"messages": said}), "auto")
    assert found.untrained == {0}
    assert found.messages == [{"role": "assistant", "content": "a"}] * 2
