"""Files that the real model learns from."""

import json
from pathlib import Path

from real import data
from real.form import one_sentence, valid_json


def test_every_answer_that_is_taught_has_the_form(tmp_path: Path) -> None:
    data.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert all(valid_json(row["messages"][1]["content"]) for row in rows)
    assert [row["messages"][0]["role"] for row in rows] == ["user"] * len(rows)


def test_answers_to_questions_for_dpo_and_grpo_are_mostly_short_sentences(tmp_path: Path) -> None:
    data.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == data.QUESTIONS
    assert sum(one_sentence(row["answer"]) for row in rows) > 0.9 * len(rows)
    taught = {line["messages"][0]["content"] for line in map(json.loads, (tmp_path / "sft.jsonl").open())}
    assert {row["messages"][0]["content"] for row in rows} <= taught
