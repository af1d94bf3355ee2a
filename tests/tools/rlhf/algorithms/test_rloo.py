"""`rlhf rloo`: a learnable reward rises, the published policy samples it, a stopped run resumes."""

import signal

import pytest

STEPS = 14


def flags(world, target, **changes):
    usual = {
        "source": world.policy, "prompts": world.prompts, "reward": world.reward("disturbed"), "target": world.root / target,
        "steps": STEPS, "max_new_tokens": 16, "learning_rate": 3e-3, "micro_batch_size": 32, "global_batch_size": 32,
        "save_every": 2, "kl_coefficient": 0.0,
    }  # fmt: skip
    return usual | changes


def test_a_learnable_reward_rises_and_a_stopped_run_resumes(world, rlhf, metrics, sampled_red):
    target, stopped = flags(world, "rloo"), flags(world, "rloo-stopped")
    assert rlhf("rloo", **target) == 0
    values = [row["reward"] for row in metrics(target["target"])]
    assert sum(values[-3:]) / 3 > 2 * sum(values[:2]) / 2
    assert sampled_red(target["target"]) > 2 * sampled_red(world.policy)
    world.order.write_text(str(int(signal.SIGTERM)))
    assert rlhf("rloo", **stopped) == 75
    assert not stopped["target"].exists()
    assert rlhf("rloo", **stopped) == 0
    assert metrics(stopped["target"]) == metrics(target["target"])


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
