"""`rlhf rloo`: a learnable reward rises, the published policy samples it, a stopped run resumes."""

import json
import signal

import pytest

from shared.checkpoint.directory.open import open_checkpoint
from shared.console import quantity

STEPS = 14


def flags(world, target, **changes):
    usual = {
        "source": world.policy, "prompts": world.prompts, "reward": world.reward("disturbed"), "target": world.root / target,
        "steps": STEPS, "max_new_tokens": 16, "learning_rate": 3e-3, "micro_batch_size": 32, "global_batch_size": 32,
        "save_every": 2, "kl_coefficient": 0.0,
    }  # fmt: skip
    return usual | changes


def test_a_learnable_reward_rises_and_a_stopped_run_resumes(world, rlhf, metrics, sampled_red, recomputed):
    """With held-out prompts; the resumed run with `--gradient-checkpointing`, too."""
    questions = world.root / "rloo-questions.jsonl"
    questions.write_text("".join(world.prompts.read_text().splitlines(keepends=True)[::16]))
    measured = {"validation_prompts": questions, "evaluate_every": STEPS // 2, "keep_best": True}
    target, stopped = flags(world, "rloo", **measured), flags(world, "rloo-stopped", **measured)
    assert rlhf("rloo", **target) == 0
    values = [row["reward"] for row in metrics(target["target"])]
    assert sum(values[-3:]) / 3 > 2 * sum(values[:2]) / 2
    assert sampled_red(target["target"]) > 2 * sampled_red(world.policy)
    rows = [json.loads(line) for line in (target["target"] / "replies.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, n) for step in (0, 7, 14) for n in range(3)]
    held_out = [row["held_out_reward"] for row in metrics(target["target"]) if "held_out_reward" in row]
    asked = [[row["reward"] for row in rows if row["step"] == step] for step in (7, 14)]
    assert held_out == [pytest.approx(sum(values) / 3) for values in asked]
    facts = open_checkpoint(target["target"], kinds=("hf",), flag="--source").facts
    assert facts["best_held_out_reward"] == pytest.approx(max(held_out))
    assert sampled_red(target["target"] / "best") > sampled_red(world.policy)
    world.order.write_text(str(int(signal.SIGTERM)))
    assert rlhf("rloo", **stopped) == 75
    assert not stopped["target"].exists()
    assert rlhf("rloo", **stopped, gradient_checkpointing=True) == 0
    assert recomputed == [2]
    assert metrics(stopped["target"]) == metrics(target["target"])


def test_at_learning_rate_zero_nothing_moves(world, rlhf, metrics, unmoved, trainers, capsys):
    """The reference of its KL penalty is a second model, once; the plan says what it takes."""
    target = world.root / "rloo-control"
    changes = {"learning_rate": 0.0, "steps": 3, "kl_coefficient": 0.05, "reward": world.reward("red")}
    assert rlhf("rloo", **flags(world, target, **changes)) == 0
    before = unmoved(target)
    rows = metrics(target)
    assert [row["kl"] for row in rows] == pytest.approx([0] * 3, abs=1e-6)
    assert max(row["reward"] for row in rows) < 0.25  # of ten colours, in 32 replies
    size = 4 * sum(tensor.numel() for tensor in before.values())
    plan = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory    reference")]
    assert plan == [f"memory    reference weights {quantity(size, 'bytes')}"]
    (trainer,) = trainers
    assert 4 * sum(each.numel() for each in trainer.ref_model.parameters()) == size


@pytest.mark.parametrize(
    ("command", "changes", "names"),
    [
        ("rloo", {"generations": 5}, ["--global-batch-size 32", "--generations 5"]),
        ("rloo", {"max_new_tokens": 96}, ["prompts.jsonl:1", "--max-new-tokens 96", "context of 96"]),
        ("grpo", {"loss": "gspo"}, ["--loss", "dapo"]),
        (
            "grpo",
            {"reward_normalisation": "normalize_then_sum", "scale_rewards": "none"},
            ["--scale-rewards none", "normalize_then_sum"],
        ),
    ],
)
def test_mistakes_are_named(world, rlhf, capsys, tmp_path, command, changes, names):
    assert rlhf(command, **flags(world, tmp_path / "out", **changes)) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in names), message
    assert not list(tmp_path.iterdir())
