"""Preference pairs of the model's own replies."""

import json
from pathlib import Path

import pytest
from real.form import one_sentence
from real.pairs import pairs, write


def row(*replies: tuple[str, str]) -> dict[str, object]:
    texts, reasons = zip(*replies, strict=True)
    answer = "Yes, bees make honey."
    return {"messages": ["asked"], "answer": answer, "completions": list(texts), "finish_reason": list(reasons)}


ROWS = [
    row(
        ("", "stop"),
        ("Bees make it. They also make wax. And then th", "length"),
        ("Bees make a lot of wax.", "stop"),
        ("Bees make honey all day. They also make w", "length"),  # the form, and more of our answer's words
        ("Honey.", "stop"),
    ),
    row(("Bees make honey all day.", "stop"), ("Yes, they make honey.", "stop")),  # all have the form
    row(("Bees and other insects that live in very", "length"), ("", "stop")),  # none has
    row(("Bees make honey all day.", "stop"), ("", "stop")),  # nothing to reject
]


def test_the_best_reply_is_preferred_to_one_without_the_form() -> None:
    (found,) = pairs(ROWS)
    assert found == {
        "prompt": ["asked"],
        "chosen": "Bees make honey all day.",
        "rejected": "Bees make it. They also make wax.",
    }
    assert one_sentence(found["chosen"])
    assert not one_sentence(found["rejected"])


def test_they_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "generations.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    write(tmp_path, tmp_path / "pairs.jsonl")
    assert "1 pairs of 4 questions" in capsys.readouterr().out
    assert [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()] == pairs(ROWS)
    source.unlink()
    write(tmp_path, tmp_path / "pairs.jsonl")
    assert "already done" in capsys.readouterr().out
