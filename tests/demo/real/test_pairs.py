"""Preference pairs of the model's own replies."""

import json
from pathlib import Path

import pytest
from real.form import one_sentence
from real.pairs import pairs, write


def row(completion: str, finish: str, answer: str = "Yes, bees make honey.") -> dict[str, object]:
    return {"messages": ["asked"], "answer": answer, "completion": completion, "finish_reason": finish}


ROWS = [
    row("Bees make it. They also make wax. And then th", "length"),
    row("Bees make honey all day.", "stop"),  # has the form already
    row("Bees make honey all day. They also make w", "length"),  # so has this, without what was cut
    row("Bees and other insects that live in very", "length"),
    row("", "stop"),
    row("One. Two.", "stop", answer="One. Two. Three."),  # ours has not the form
    row("Honey.", "stop"),
]


def test_a_short_sentence_is_preferred_to_the_models_own_text() -> None:
    found = pairs(ROWS)
    assert [pair["rejected"] for pair in found] == [
        "Bees make it. They also make wax.",
        "Bees and other insects that live in very",
        "Honey.",
    ]
    assert {pair["chosen"] for pair in found} == {"Yes, bees make honey."}
    assert [pair["prompt"] for pair in found] == [["asked"]] * 3
    assert not any(one_sentence(pair["rejected"]) for pair in found)


def test_they_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "generations.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    write(tmp_path, tmp_path / "pairs.jsonl")
    assert "3 pairs of 7 questions" in capsys.readouterr().out
    assert [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()] == pairs(ROWS)
    source.unlink()
    write(tmp_path, tmp_path / "pairs.jsonl")
    assert "already done" in capsys.readouterr().out
