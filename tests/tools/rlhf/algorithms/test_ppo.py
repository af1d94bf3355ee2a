"""`rlhf ppo`: a learnable reward rises, a control stays flat, the published policy samples it, a killed run resumes exactly."""

import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS = 10


def flags(world, target, **changes):
    usual = {
        "source": world.policy, "prompts": world.prompts, "reward": world.reward("disturbed"), "target": world.root / target,
        "steps": STEPS, "max_new_tokens": 16, "learning_rate": 2e-3, "micro_batch_size": 16, "kl_coefficient": 0.01,
        "rollout_batch_size": 32, "global_batch_size": 16, "save_every": 2,
    }  # fmt: skip
    return usual | changes


@pytest.fixture(scope="module")
def trained(world, rlhf):
    target = flags(world, "ppo")
    assert rlhf("ppo", **target) == 0
    return target["target"]


def means(rows, name="reward"):
    """Mean of the first two and of the last three iterations."""
    values = [row[name] for row in rows]
    return sum(values[:2]) / 2, sum(values[-3:]) / 3


def test_a_learnable_reward_rises(trained, metrics):
    rows = metrics(trained)
    first, last = means(rows)
    assert len(rows) == STEPS
    assert last > 3 * first, rows
    assert rows[0]["kl_reply"] == pytest.approx(0, abs=1e-3)  # policy and reference start as the same weights
    assert rows[-1]["kl_reply"] > 1
    assert max(row["log_prob_gap_max"] for row in rows) < 1e-3  # float32 sums in another order, over 16 tokens
    assert {"entropy", "clip_fraction", "value_loss", "explained_variance", "reply_tokens"} <= set(rows[0])


def test_sampling_from_the_directory_shows_the_reward(world, trained, metrics, sampled_red, load_exactly):
    load_exactly(AutoModelForCausalLM, trained)
    before, after = sampled_red(world.policy), sampled_red(trained)
    _, last = means(metrics(trained))
    assert after > 3 * before
    assert after == pytest.approx(last, abs=0.15)  # 48 replies have a standard error of about 0.04


def test_auxiliary_files_are_the_sources(world, trained):
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (trained / name).read_bytes() == (world.policy / name).read_bytes()
    source, target = (json.loads((place / "config.json").read_text()) for place in (world.policy, trained))
    assert source.items() <= target.items()
    assert AutoTokenizer.from_pretrained(trained).get_vocab() == AutoTokenizer.from_pretrained(world.policy).get_vocab()


def test_at_learning_rate_zero_nothing_moves(world, rlhf, metrics, sampled_red):
    target = world.root / "control"
    assert rlhf("ppo", **flags(world, target, learning_rate=0.0, steps=5)) == 0
    rows = metrics(target)
    first, last = means(rows)
    assert last < 2 * first
    assert all(abs(row["kl_reply"]) < 1e-3 and row["clip_fraction"] == 0 for row in rows)
    assert sampled_red(target) == sampled_red(world.policy)


def test_a_killed_and_a_stopped_run_resume_to_the_same_result(world, rlhf, process, trained, metrics):
    """SIGKILL in iteration 3 of one process, SIGUSR1 in iteration 3 after that, then to the end: the same digits."""
    target = flags(world, "killed")
    world.order.write_text(str(int(signal.SIGKILL)))
    killed = process("ppo", **target)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not target["target"].exists()

    world.order.write_text(str(int(signal.SIGUSR1)))
    assert rlhf("ppo", **target) == 75
    assert not target["target"].exists()
    assert rlhf("ppo", **target) == 0
    assert metrics(target["target"]) == metrics(trained)
    assert (target["target"] / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert not target["target"].with_name("killed.state").exists()
    assert rlhf("ppo", **target) == 0  # done already


def test_state_of_other_options_is_not_resumed(world, rlhf, capsys):
    target = flags(world, "changed")
    world.order.write_text(str(int(signal.SIGTERM)))
    assert rlhf("ppo", **target) == 75
    assert rlhf("ppo", **target | {"learning_rate": 1e-3}) == 2
    assert "changed.state holds the state of an unfinished run" in capsys.readouterr().err
    assert rlhf("ppo", **target | {"learning_rate": 1e-3, "overwrite": True, "steps": 1}) == 0


def test_state_that_would_run_code_is_refused(world, rlhf, capsys):
    """DeepSpeed unpickles whatever a file holds."""
    target = flags(world, "code", zero=2)
    world.order.write_text(str(int(signal.SIGTERM)))
    assert rlhf("ppo", **target) == 75
    (file,) = target["target"].with_name("code.state").glob("step_*/actor/*optim_states.pt")
    torch.save({"optimizer_state_dict": Mine(world.root / "ran")}, file)
    assert rlhf("ppo", **target) == 2
    refused = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(words in refused for words in (str(file), "GLOBAL", "--overwrite"))
    assert not (world.root / "ran").exists()
    file.write_bytes(file.read_bytes()[:100])
    assert rlhf("ppo", **target) == 2
    assert f"{file} is no file" in capsys.readouterr().err.strip().splitlines()[-1]


class Mine:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_micro_batches_do_not_change_the_result(world, rlhf, metrics):
    """Losses are sums over micro-batches divided by the mini-batch's tokens, whatever the replies' lengths."""
    small, large = (world.root / f"micro-{size}" for size in (4, 16))
    for size, target in ((4, small), (16, large)):
        changes = {"micro_batch_size": size, "steps": 2, "learning_rate": 1e-4, "zero": 1}
        assert rlhf("ppo", **flags(world, target, **changes)) == 0
    for one, other in zip(metrics(small), metrics(large), strict=True):
        for name in ("reward", "kl_reply", "policy_loss", "value_loss", "entropy", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name  # float32 sums in another order


def test_two_processes_with_zero_2(world, process, reward_model, metrics):
    """Two gloo processes share optimizer state and gradients, and score with a reward model; the critic starts from it."""
    target = flags(world, "zero", reward=f"0.5*model:{reward_model},{world.reward('red')}", steps=4, micro_batch_size=8)
    held_out = world.root / "five.jsonl"  # an odd number, for two processes
    held_out.write_text("".join(world.prompts.read_text().splitlines(keepends=True)[:5]))
    done = process("ppo", **target, zero=2, processes=2, validation_prompts=held_out, keep_best=True)
    assert done.returncode == 0, done.stderr
    assert f"critic    from {reward_model}" in done.stderr
    replies = [json.loads(line) for line in (target["target"] / "replies.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in replies] == [(step, row) for step in (0, 4) for row in range(5)]
    AutoModelForCausalLM.from_pretrained(target["target"] / "best")
    rows = metrics(target["target"])
    for row in rows:
        assert row["reward"] == pytest.approx(0.5 * row["reward/reward"] + row["reward/red"], abs=1e-5)
    assert rows[-1]["reward"] > rows[0]["reward"]
    assert max(row["log_prob_gap_max"] for row in rows) < 1e-3
    AutoModelForCausalLM.from_pretrained(target["target"])


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"global_batch_size": 24}, 2, ["--global-batch-size 24", "--micro-batch-size 16"]),
        ({"rollout_batch_size": 24}, 2, ["--rollout-batch-size 24", "--global-batch-size 16"]),
        ({"max_new_tokens": 95}, 2, ["prompts.jsonl:1", "--max-new-tokens 95", "context of 96"]),
        ({"reward": "wrong_count"}, 1, ["rewards.py:wrong_count", "1 rewards for 32"]),
        ({"reward": "not_finite"}, 1, ["rewards.py:not_finite", "nan"]),
        ({"reward": "broken"}, 1, ["rewards.py:broken", "ZeroDivisionError"]),
        ({"reward": "leaves"}, 1, ["rewards.py:leaves", "SystemExit"]),
        ({"reward": "missing"}, 2, ["rewards.py:missing", "no such function", "disturbed"]),
        ({"learning_rate": 1e30}, 1, ["at iteration", "--learning-rate"]),
    ],
)
def test_mistakes_and_failures_are_named(world, rlhf, capsys, changes, code, names):
    if "reward" in changes:
        changes = {"reward": world.reward(changes["reward"])}
    assert rlhf("ppo", **flags(world, "refused", **changes), overwrite=True) == code
    message = capsys.readouterr().err
    assert all(name in message for name in names), message
    assert not (world.root / "refused").exists()
