"""Preferences in the forms of published data sets: the same pair from each, TRL's split, and what is ambiguous."""

import json
from pathlib import Path

import pytest

from shared.data.sources import Row
from shared.errors import UserError
from tools.rlhf.data import read_preferences
from tools.rlhf.preferences import Reply, preference

USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "red"), ("assistant", " blue"), ("assistant", " pink"))
)
BOTH = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
REPLIES = {"chosen": " blue", "rejected": " pink"}
HUMAN = [{"from": "human", "value": "red"}]
GPT_GOOD, GPT_BAD = ({"from": "gpt", "value": reply["content"]} for reply in (GOOD, BAD))
CHAT = {
    "explicit": {"prompt": [USER], **REPLIES},
    "one message": {"prompt": [USER], "chosen": GOOD, "rejected": [BAD]},
    "implicit": BOTH,
    "ultrafeedback": {"prompt": "red", "prompt_id": "p", "messages": [USER, GOOD], "score_chosen": 8.0, **BOTH},
    "prompt repeated": {"prompt": [USER], **BOTH},
    "sharegpt": {
        "conversations": HUMAN,
        "chosen": GPT_GOOD,
        "rejected": GPT_BAD,
    },
    "sharegpt conversations": {
        "chosen": [*HUMAN, GPT_GOOD],
        "rejected": [*HUMAN, GPT_BAD],
    },
    "alpaca": {"instruction": "red", "input": "", **REPLIES},
    "alpaca list": {"instruction": "red", "output": [" blue", " pink"]},
}
HH = "\n\nHuman: a\n\nAssistant:"


def _row(value: dict) -> Row:
    return Row(value=value, path=Path("rows.jsonl"), line=7)


@pytest.mark.parametrize("form", CHAT)
def test_every_form_of_a_chat_is_the_same_pair(form):
    assert preference(_row(CHAT[form])) == (Reply(prompt=[USER], text=" blue"), Reply(prompt=[USER], text=" pink"))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_split_of_conversations_is_trls(turns):
    from trl import extract_prompt

    talk = [
        m
        for n in range(turns)
        for m in ({"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"})
    ]
    row = {"chosen": talk, "rejected": [*talk[:-1], BAD]}
    wanted = extract_prompt(row)
    chosen, rejected = preference(_row(row))
    assert chosen.prompt == rejected.prompt == wanted["prompt"]
    assert [chosen.text, rejected.text] == [wanted[side][0]["content"] for side in ("chosen", "rejected")]


def test_conversations_that_part_early_are_scored_at_their_last_reply():
    more = {"role": "user", "content": "and?"}
    chosen, rejected = preference(_row({"chosen": [USER, GOOD, more, BAD], "rejected": [USER, BAD, more, GOOD]}))
    assert (chosen.prompt, chosen.text) == ([USER, GOOD, more], " pink")
    assert (rejected.prompt, rejected.text) == ([USER, BAD, more], " blue")


def test_anthropic_hh():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    for further in ({}, {"prompt": "c"}, {"prompt": start}):
        chosen, rejected = preference(_row({"chosen": f"{start} blue", "rejected": f"{start} pink", **further}))
        assert (chosen, rejected) == (Reply(prompt=start, text=" blue"), Reply(prompt=start, text=" pink"))


def test_a_text_without_a_prompt_is_one_sequence(tmp_path, world):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.policy)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"chosen": "colors: red blue", "rejected": "colors: red black"}) + "\n")
    ((pair,), _) = read_preferences(path, tokenizer, max_length=96)
    assert pair.chosen == (*tokenizer("colors: red blue")["input_ids"], 1)
    assert pair.rejected == (*tokenizer("colors: red black")["input_ids"], 1)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "'chosen' is neither a text nor"),
        ({"prompt": "a", "chosen": "b"}, "no column 'rejected'"),
        (REPLIES, "no column 'prompt', and"),
        ({"question": "q", "chosen": "It is", "rejected": "It was"}, "if 'question' is the prompt"),
        ({"prompt": "a", "instruction": "b", **REPLIES}, "'prompt' and 'instruction' both hold a prompt"),
        ({"prompt": "other", **BOTH}, "'prompt' is no message of the conversations"),
        ({"prompt": [{"role": "user", "content": "other"}], **BOTH}, "do not begin with the row's prompt"),
        ({"prompt": "co", "chosen": "colors", "rejected": "cold"}, "both begin with 'prompt'"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "other"}, BAD]}, "different messages"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "different messages"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "share no message of the user"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD, USER]}, "'rejected' ends with a message of the user"),
        ({"chosen": [USER, GOOD], "rejected": " pink"}, "give both alike"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "different questions"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"}, "'rejected' is no conversation"),
        (
            {"prompt": "z", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            "'prompt' is not in",
        ),
        ({"instruction": "a", "output": ["b"]}, "list of two texts"),
        ({"conversations": HUMAN, "chosen": {"from": "bot", "value": "b"}, "rejected": "c"}, "'from' 'bot'"),
    ],
)
def test_what_is_ambiguous_or_broken_is_named(row, problem):
    with pytest.raises(UserError, match=r"^rows\.jsonl:7: ") as caught:
        preference(_row(row))
    assert problem in str(caught.value)
