"""Rows of three formats become lists of messages; errors have file and line."""

from pathlib import Path
from typing import Any

import pytest

from shared.data.sources import Row
from shared.errors import UserError
from tools.sft.conversations import Format, conversation

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
        ({"text": "x"}, "auto", "none of messages, conversations, instruction is a key"),
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
    ],
)
def test_a_bad_row_is_named(value: dict[str, Any], form: Format, problem: str) -> None:
    with pytest.raises(UserError, match=r"^rows\.jsonl:7: ") as caught:
        conversation(_row(value), form)
    assert problem in str(caught.value)
