"""Tables of answers, and the verdict."""

import json
import re
from pathlib import Path

import pytest
from real import verdict

GOOD, BAD = '{"answer": "yes", "confidence": "high"}', "<b>yes</b>"


def written(work: Path, **files: dict[str, list[str]]) -> None:
    (work / "answers").mkdir()
    for name, models in files.items():
        questions = {"questions": [f"q{n}" for n in range(5)]}
        (work / "answers" / f"{name}.json").write_text(json.dumps(questions | models))


@pytest.mark.parametrize(("merged", "code"), [([GOOD] * 4 + [BAD], 0), ([GOOD] * 3 + [BAD] * 2, 1)])
def test_the_verdict_is_of_every_trained_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], merged: list[str], code: int
) -> None:
    written(tmp_path, tuned={"base": [BAD] * 5, "json": [GOOD] * 5}, merged={"merged": merged})
    assert verdict.verdict(tmp_path, ("sft",)) == code
    said = capsys.readouterr().out
    assert re.search(r"base +0\.0%", said)
    assert ("NO   merged: 60.0%" in said) == (code == 1)
    page = (tmp_path / "answers.html").read_text()
    assert "<b>yes" not in page
    assert page.count('class="yes"') == 5 + merged.count(GOOD)
    assert page.count('class="no"') == 5 + merged.count(BAD)


LONG = "Bees make honey. They live in hives, and there are very many of them in each."
SHORT = "Bees make honey all day."


def test_each_training_has_its_table_with_the_base_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(
        tmp_path,
        base={"base": [LONG] * 4 + [SHORT]},
        dpo={"dpo": [f"Bees make honey in {n} ways." for n in range(5)]},
        grpo={"grpo": [SHORT] * 2 + ["Honey."] * 3},
    )
    assert verdict.verdict(tmp_path, ("dpo", "grpo")) == 1
    said = capsys.readouterr().out
    assert said.count("base      20.0% in the form,  13.8 words, 2 different") == 2
    assert "dpo      100.0% in the form,   6.0 words, 5 different" in said
    assert "grpo      40.0% in the form,   2.6 words, 2 different" in said
    assert "yes  dpo: 100.0%" in said
    assert "NO   grpo: 40.0%" in said
    page = (tmp_path / "answers.html").read_text()
    assert page.count("<h2>") == 2
    assert page.count('class="yes"') == 1 + 5 + 1 + 2
    assert verdict.verdict(tmp_path, ("dpo",)) == 0
