"""`rlhf score`: transformers' own scores of the directory, in the order of the rows; what a kill left is kept."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shared.errors import StageError
from tools.rlhf import score


@pytest.fixture(scope="module")
def rows(world):
    """A pair, a reply, one that was cut, several, and a conversation; of unlike lengths, more than a batch."""
    pairs = [json.loads(line) for line in world.pairs.read_text().splitlines()[:20]]
    said = [{"prompt": "colors:", "completion": " red" * (1 + n % 9), "number": n} for n in range(40)]
    return [
        *pairs,
        *said,
        {"prompt": "colors:", "completion": " red red", "finish_reason": "length"},
        {"prompt": "colors:", "completions": [" red", " blue blue"], "finish_reason": ["stop", "length"]},
        {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": " blue"}]},
    ]


@pytest.fixture(scope="module")
def expected(reward_model, rows):
    """Scores of one sequence at a time, by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32)

    @torch.no_grad()
    def of(text, end=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [1] * end
        return model(torch.tensor([ids])).logits.item()

    found = []
    for row in rows:
        if "chosen" in row:
            sides = {f"reward_{side}": of(row["prompt"] + row[side]) for side in ("chosen", "rejected")}
            found.append(row | sides)
        elif "messages" in row:
            found.append(row | {"reward": of("colors: red blue")})
        elif "completions" in row:
            one, other = row["completions"]
            found.append(row | {"rewards": [of(row["prompt"] + one), of(row["prompt"] + other, end=False)]})
        else:
            found.append(row | {"reward": of(row["prompt"] + row["completion"], end="finish_reason" not in row)})
    return found


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_are_those_of_transformers(rlhf, reward_model, rows, expected, tmp_path, capsys):
    data = written(tmp_path / "rows.jsonl", rows)
    target = tmp_path / "scores"
    assert rlhf("score", source=reward_model, data=data, target=target, precision="fp32", micro_batch_size=3) == 0
    result = json.loads(capsys.readouterr().out)
    found = [json.loads(line) for line in (target / "scores.jsonl").read_text().splitlines()]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-6) if "number" in one else one.keys() == other.keys()
        for name in ("reward", "rewards", "reward_chosen", "reward_rejected"):
            assert one.get(name) == pytest.approx(other.get(name), abs=1e-6)  # float32: padded or alone
    pairs = [row for row in expected if "chosen" in row]
    right = sum(row["reward_chosen"] > row["reward_rejected"] for row in pairs)
    assert (result["rows"], result["pairs"], result["accuracy"]) == (len(rows), 20, right / 20)
    assert 0 <= result["expected_calibration_error"] < 1
    rewards = [
        value for row in expected for value in [*row.get("rewards", []), *([row["reward"]] if "reward" in row else [])]
    ]
    assert result["reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
    assert json.loads((target / "manifest.json").read_text())["kind"] == "result"


def test_what_a_kill_left_is_not_scored_again(rlhf, reward_model, rows, tmp_path, monkeypatch):
    data, whole = written(tmp_path / "rows.jsonl", rows[20:60]), tmp_path / "whole"
    flags = {"source": reward_model, "data": data, "precision": "fp32", "micro_batch_size": 2}
    monkeypatch.setattr(score, "_BATCHES", 4)  # 8 rows at a time
    assert rlhf("score", **flags, target=whole) == 0
    calls, plain = [], score.score

    def failing(model, sequences, *args):
        calls.append(len(sequences))
        if len(calls) == 10:
            raise StageError("the machine stopped")
        return plain(model, sequences, *args)

    target = tmp_path / "target"
    monkeypatch.setattr(score, "score", failing)
    assert rlhf("score", **flags, target=target) == 1
    assert not target.exists()
    (partial,) = tmp_path.glob("target.partial-*")
    output = partial / "scores.jsonl"
    assert len(output.read_text().splitlines()) == 16
    with output.open("a") as file:
        file.write('{"prompt": "col')  # a kill may cut a line
    assert rlhf("score", **flags, target=target) == 0
    assert sum(calls[10:]) == 40 - 16
    assert (target / "scores.jsonl").read_bytes() == (whole / "scores.jsonl").read_bytes()
    assert not list(tmp_path.glob("target.partial-*"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "colors:", "completion": " red" * 100}, ["rows.jsonl:2", "context is 96"]),
        ({"prompt": "", "completion": "", "finish_reason": "length"}, ["rows.jsonl:2", "empty"]),
        ({"prompt": "colors:"}, ["rows.jsonl:2", "no reply to score"]),
    ],
)
def test_a_row_that_cannot_be_scored_is_named_before_any_is(
    rlhf, reward_model, tmp_path, capsys, monkeypatch, row, words
):
    data = written(tmp_path / "rows.jsonl", [{"prompt": "colors:", "completion": " red"}, row])
    monkeypatch.setattr(score, "score", None)
    assert rlhf("score", source=reward_model, data=data, target=tmp_path / "scores") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in message for word in words), message
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_wrong_inputs_name_the_flag(rlhf, world, reward_model, tmp_path, capsys):
    data, target = written(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}]), tmp_path / "scores"
    assert rlhf("score", source=world.policy, data=data, target=target) == 2
    assert f"--source {world.policy} is no reward model" in capsys.readouterr().err
    empty = written(tmp_path / "empty.jsonl", [])
    assert rlhf("score", source=reward_model, data=empty, target=target) == 2
    assert "empty.jsonl" in capsys.readouterr().err
