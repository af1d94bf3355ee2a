"""Rows of replies in each form, and what is ambiguous."""

from pathlib import Path

import pytest

from shared.data.sources import Row
from shared.errors import UserError
from tools.rlhf.preferences import Reply
from tools.rlhf.scored_rows import ends, replies_of

USER, SAID = {"role": "user", "content": "red"}, {"role": "assistant", "content": " blue"}
HH = "\n\nHuman: a\n\nAssistant:"
FORMS = {
    "prompt": ({"prompt": "red", "completion": " blue"}, "red"),
    "reply": ({"prompt": "red", "reply": " blue"}, "red"),
    "message": ({"prompt": [USER], "response": [SAID]}, [USER]),
    "generated": ({"messages": [USER], "completion": " blue", "finish_reason": "stop"}, [USER]),
    "conversation": ({"messages": [USER, SAID]}, [USER]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "red"}, {"from": "gpt", "value": " blue"}]}, [USER]),
    "alpaca": ({"instruction": "red", "response": " blue"}, [USER]),
}


def row(value):
    return Row(value=value, path=Path("rows.jsonl"), line=7)


@pytest.mark.parametrize("form", FORMS)
def test_a_reply_in_every_form(form):
    value, prompt = FORMS[form]
    assert replies_of(row(value)) == {"reward": [Reply(prompt=prompt, text=" blue")]}


def test_pairs_of_messages_and_of_text():
    """ultrafeedback and anthropic-hh."""
    other = {"role": "assistant", "content": " pink"}
    value = {"prompt": "red", "messages": [USER, SAID], "chosen": [USER, SAID], "rejected": [USER, other]}
    assert replies_of(row(value)) == {
        "reward_chosen": [Reply(prompt=[USER], text=" blue")],
        "reward_rejected": [Reply(prompt=[USER], text=" pink")],
    }
    value = {"chosen": f"{HH} b", "rejected": f"{HH} c"}
    assert replies_of(row(value))["reward_rejected"] == [Reply(prompt=HH, text=" c")]


def test_several_completions_and_how_they_ended():
    value = {"prompt": "red", "completions": [" blue", " pink"], "finish_reason": ["stop", "length"]}
    assert [reply.text for reply in replies_of(row(value))["rewards"]] == [" blue", " pink"]
    assert ends(row(value)) == {"rewards": [True, False]}
    assert ends(row({"prompt": "red", "completion": " blue"})) == {"reward": [True]}
    assert ends(row({"prompt": "red", "completion": " blue", "finish_reason": "length"})) == {"reward": [False]}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"prompt": "a"}, ["no reply to score", "prompt"]),
        ({}, ["no reply to score", "nothing"]),
        ({"completion": "a"}, ["no 'prompt' to 'completion'"]),
        ({"prompt": "a", "completion": 3}, ["'completion' is no text"]),
        ({"prompt": "a", "completions": []}, ["'completions'", "empty"]),
        ({"prompt": "a", "completion": "b", "reply": "c"}, ["'completion' and 'reply'"]),
        ({"prompt": "a", "messages": [USER], "completion": "b"}, ["'prompt' and 'messages' both hold a prompt"]),
        ({"messages": [USER]}, ["'messages' does not end"]),
        ({"messages": [SAID]}, ["'messages' does not end"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}, ["'completion' beside a pair"]),
        ({"prompt": "a", "chosen": "b"}, ["'rejected'"]),
        ({"prompt": "a", "completion": "b", "reward": 1}, ["'reward' already"]),
    ],
)
def test_what_is_refused_names_line_and_columns(value, words):
    with pytest.raises(UserError) as refused:
        replies_of(row(value))
    assert all(word in str(refused.value) for word in ["rows.jsonl:7", *words]), refused.value
