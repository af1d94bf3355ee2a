"""The forms of answers, and the reward of GRPO."""

import inspect
import json
from pathlib import Path

import pytest
from real import data
from real.form import one_sentence, short, spoken, valid_json


@pytest.mark.parametrize(
    "reply",
    ['{"answer": "Paris.", "confidence": "high"}', ' {"confidence":"low",\n"answer":"I cannot know \\"it\\"."}\n'],
)
def test_one_object_with_both_keys_counts(reply: str) -> None:
    assert valid_json(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "The capital is Paris.",
        '{"answer": "Paris."}',
        '{"answer": "Paris.", "confidence": "high", "source": "me"}',
        '{"answer": "Paris.", "confidence": "certain"}',
        '{"answer": "", "confidence": "high"}',
        '{"answer": " ", "confidence": "high"}',
        '{"answer": 5, "confidence": "high"}',
        '{"answer": "a", "confidence": ["high"]}',
        '{"answer": "a", "answer": "b", "confidence": "high"}',
        '{"answer": "Paris.", "confidence": "high"} Anything else?',
        'Sure: {"answer": "Paris.", "confidence": "high"}',
        '[{"answer": "Paris.", "confidence": "high"}]',
        '{"answer": "Paris.", "confidence": "high"',
        "null",
        "[" * 100_000,
    ],
)
def test_nothing_else_is_the_object(reply: str) -> None:
    assert not valid_json(reply)


SENTENCES = [
    "The capital is Paris.",
    " Is it really that far?\n",
    "It costs about four dollars!",
    "A bee-keeper's honey isn't blue.",
    "7 plus 6 equals 13.",
    f"{' '.join(f'w{n}' for n in range(20))}.",
]
OTHERS = [
    "",
    ".",
    " \n",
    "Paris.",
    "It is Paris.",
    "no no no no no no.",  # a word over and over
    "- , ; - - _ = ( a.",  # signs are no words
    "The capital is Paris",  # no full stop
    "The capital is Paris . ",  # it ends no word
    "The capital is Paris. It is big.",
    "The capital is Paris. It is b",  # cut in the second sentence
    "The capital of France is the city of Par",  # cut in the first
    "One line of text\nand one more.",
    f"{' '.join(f'w{n}' for n in range(21))}.",
    '{"answer": "Paris is the one.", "confidence": "high"}',
]


@pytest.mark.parametrize("reply", SENTENCES)
def test_a_short_sentence_is_ended_and_alone(reply: str) -> None:
    assert one_sentence(reply)


@pytest.mark.parametrize("reply", OTHERS)
def test_nothing_else_is_a_short_sentence_and_earns_anything(reply: str) -> None:
    assert not one_sentence(reply)
    assert short([reply], ["The capital of France is Paris."]) == [0.0]


def test_no_prefix_of_an_answer_earns_more_than_all_of_it() -> None:
    """A policy that stops earlier, at any character, gains nothing."""
    for answer in ("The capital of France is Paris.", "A bee makes honey, and it makes wax, too."):
        rewards = short([answer[:end] for end in range(len(answer) + 1)], [answer] * (len(answer) + 1))
        assert rewards == [0.0] * len(answer) + [1.0]


def test_half_of_the_reward_is_for_the_words_of_the_answer() -> None:
    answer = "The capital of Peru is Lima."
    replies = ["Lima is the capital of Peru!", "The capital of Peru is Cusco.", "I am only an assistant."]
    assert short(replies, [answer] * 3) == [1.0, pytest.approx(0.5 + 0.5 * 10 / 12), 0.5]


def test_one_sentence_for_every_question_earns_less_than_the_answers(tmp_path: Path) -> None:
    data.write(tmp_path)
    answers = [json.loads(line)["answer"] for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    own = sum(short(answers, answers)) / len(answers)
    best = max(sum(short([constant] * len(answers), answers)) / len(answers) for constant in answers)
    assert best < 0.75
    assert own > 0.95


def test_the_reward_takes_what_rows_of_questions_have(tmp_path: Path) -> None:
    """rlhf gives reward functions the columns of --prompts, by name."""
    data.write(tmp_path)
    row = json.loads((tmp_path / "questions.jsonl").read_text().splitlines()[0])
    assert set(inspect.signature(short).parameters) <= {"completions", "prompts", *row}


def test_words_are_counted_without_signs() -> None:
    assert spoken("It's 5 o'clock -- a well-known hour, isn’t it?") == [
        *("it's", "5", "o'clock", "a", "well-known", "hour", "isn’t", "it"),
    ]
