"""`infer compare`: two results on the double."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shared.cli import invoked
from shared.errors import UserError
from tests.tools.infer.engines.double import EngineDouble
from tests.tools.infer.test_evaluate import HELD_OUT, OPTIONS, question
from tools.infer import compare, evaluate
from tools.infer.engines.engine import EngineSettings


def evaluated(source: Path, tasks: Path, target: Path, monkeypatch, **changes) -> Path:
    monkeypatch.setattr(evaluate, "open_engine", EngineDouble().open)
    with invoked("infer", "evaluate", {}):
        evaluate.run(source, (str(tasks),), target, **OPTIONS | changes, settings=EngineSettings())
    return target


def compared(first: Path, second: Path, target: Path) -> dict:
    with invoked("infer", "compare", {}):
        compare.run(first, second, target, resamples=50, seed=1, overwrite=False)
    return json.loads((target / "comparison.json").read_text())


@pytest.fixture
def result(models, monkeypatch, tmp_path) -> Path:
    (tasks := tmp_path / "tasks").mkdir()
    question(tasks, "mine")
    (tasks / "held_out.yaml").write_text(HELD_OUT)
    (tasks / "held_out.jsonl").write_text('{"text": "one fox"}\n{"text": "the dog"}\n{"text": "a lazy dog"}\n')
    return evaluated(models("llama"), tasks, tmp_path / "first", monkeypatch)


def edited(result: Path, name: str, task: str, change) -> Path:
    """A copy of a result whose examples are changed, as if another model had been measured."""
    (target := result.with_name(name)).mkdir()
    shutil.copytree(result, target, dirs_exist_ok=True)
    (target / "manifest.json").unlink()
    path = target / f"samples_{task}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows, report := json.loads((target / "results.json").read_text()))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (target / "results.json").write_text(json.dumps(report))
    files = [file for file in target.iterdir() if file.is_file()]
    with (
        invoked("infer", "evaluate", {}),
        compare.publish(target.with_name(f"{name}-out"), kind="result", inputs={}) as out,
    ):
        for file in files:
            shutil.copyfile(file, out.path / file.name)
    return target.with_name(f"{name}-out")


def test_every_metric_is_compared_with_its_own_statistic(result, tmp_path, capsys):
    def better(rows, report):
        for row in rows[:2]:
            row["acc"] = 1.0 - row["acc"]
        report["results"]["mine"]["acc,none"] = sum(row["acc"] for row in rows) / len(rows)

    other = edited(result, "second", "mine", better)
    found = compared(result, other, tmp_path / "out")
    acc, bits = found["tasks"]["mine"]["acc"], found["tasks"]["held_out"]["bits_per_byte"]
    assert acc["second"] - acc["first"] == acc["difference"] == 0.5
    assert acc["low"] < 0.5 < acc["high"]
    assert bits["first"] == bits["second"] == 1.0  # the double scores every byte with one bit
    assert bits["p"] == 1
    assert (found["seed"], found["resamples"], found["confidence"]) == (1, 50, 0.95)
    assert "+0.5000" in (tmp_path / "out/report.html").read_text()
    assert "+0.5000" in capsys.readouterr().out


def test_a_metric_that_is_no_mean_is_left_out_by_name(result, tmp_path, capsys):
    def other_number(rows, report):
        report["results"]["mine"]["acc,none"] = 0.123

    found = compared(result, edited(result, "second", "mine", other_number), tmp_path / "out")
    assert set(found["tasks"]) == {"held_out"}
    assert "mine: acc is no mean over examples, so it is not compared" in capsys.readouterr().err


def test_other_examples_are_refused(result, models, monkeypatch, tmp_path):
    fewer = evaluated(models("llama"), tmp_path / "tasks", tmp_path / "fewer", monkeypatch, limit=2)
    with pytest.raises(
        UserError, match=r"held_out has 2 examples, and the baseline 3; evaluate both with the same --limit"
    ):
        compared(result, fewer, tmp_path / "out")

    def another(rows, report):
        rows[1]["doc_hash"] = "0"

    with pytest.raises(UserError, match="example 1 of mine is another one than the baseline's"):
        compared(result, edited(result, "second", "mine", another), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_without_examples_is_refused(result, models, monkeypatch, tmp_path):
    bare = evaluated(models("llama"), tmp_path / "tasks", tmp_path / "bare", monkeypatch, keep_samples=False)
    with pytest.raises(UserError, match=r"--source .*bare has no samples_\w+.jsonl; evaluate with --keep-samples"):
        compared(result, bare, tmp_path / "out")
