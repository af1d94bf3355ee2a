"""`rlhf reward`: accuracy rises, the directory loads, dropped pairs are counted, a stopped run resumes to the same result."""

import json

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shared.checkpoint.directory.open import open_checkpoint


def test_accuracy_rises_on_separable_pairs(reward_model):
    facts = open_checkpoint(reward_model, kinds=("hf",), flag="--source").facts
    assert facts["accuracy_after"] >= 0.95
    assert facts["accuracy_after"] > facts["accuracy_before"]
    assert (facts["pairs"], facts["held_out"], facts["dropped"]) == (216, 24, 0)
    assert facts["brier"] < 0.1  # guessing is 0.25
    assert 0 <= facts["expected_calibration_error"] < 0.5
    report = (reward_model / "report.html").read_text()
    assert "Calibration on held-out pairs" in report
    assert f"Brier score {facts['brier']:.4f}" in report


def test_the_directory_loads_exactly_and_scores_the_reward(world, reward_model, load_exactly):
    model = load_exactly(AutoModelForSequenceClassification, reward_model)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(world.policy).get_vocab()
    texts = ["colors: red red red blue red<eos>", "colors: blue pink pink blue green<eos>"]
    good, bad = model(**tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)).logits[:, 0]
    assert good > bad + 1
    made = {"report.html", "metrics.jsonl", "manifest.json", "tensorboard"}
    assert made <= {path.name for path in reward_model.iterdir()}
    assert not reward_model.with_name("reward.state").exists()


def test_long_pairs_are_dropped_and_counted(world, rlhf, tmp_path, capsys):
    long = {"prompt": "colors:", "chosen": " red" * 200, "rejected": " blue"}
    data = tmp_path / "pairs.jsonl"
    data.write_text(world.pairs.read_text() + json.dumps(long) + "\n")
    code = rlhf(
        "reward", source=world.policy, data=data, target=tmp_path / "out", validation_fraction=0, epochs=0.2,
        global_batch_size=8,
    )  # fmt: skip
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"accuracy_before": None, "accuracy_after": None, "pairs": 240, "held_out": 0, "dropped": 1}


def test_a_stopped_run_resumes_to_the_same_result(world, rlhf, reward_model, metrics, signalled, recomputed):
    """Stopped by a signal, run again with `--gradient-checkpointing`: every later update equals the uninterrupted run's."""
    target = world.root / "stopped"
    flags = {"source": world.policy, "data": world.pairs, "target": target, "epochs": 2, "learning_rate": 1e-3}
    signalled(5)
    assert rlhf("reward", **flags) == 75
    assert not target.exists()
    half = target.with_name("stopped.state") / "trainer" / "checkpoint-9"
    half.mkdir()  # of a kill while saving: no marker
    assert rlhf("reward", **flags, gradient_checkpointing=True) == 0
    assert recomputed == [2]
    assert metrics(target) == metrics(reward_model)
    assert (target / "model.safetensors").read_bytes() == (reward_model / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("{not json", ["pairs.jsonl:241", "not JSON"]),
        ('{"prompt": "a", "chosen": "b"}', ["pairs.jsonl:241", "'rejected'"]),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', ["pairs.jsonl:241", "the same"]),
        ('{"prompt": "a", "chosen": 3, "rejected": "b"}', ["pairs.jsonl:241", "'chosen'"]),
    ],
)
def test_bad_rows_are_named(world, rlhf, tmp_path, capsys, line, names):
    data = tmp_path / "pairs.jsonl"
    data.write_text(world.pairs.read_text() + line + "\n")
    assert rlhf("reward", source=world.policy, data=data, target=tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert all(name in message for name in names), message
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_too_few_pairs_name_the_numbers(world, rlhf, tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(world.pairs.read_text().splitlines(keepends=True)[:20]))
    assert rlhf("reward", source=world.policy, data=data, target=tmp_path / "out") == 2
    assert "leaves 18 pairs" in capsys.readouterr().err
