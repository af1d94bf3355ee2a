"""`rlhf grpo`: a learnable reward rises, a control stays flat, the published policy samples it, a stopped run resumes."""

import os
import signal

import pytest
from transformers import AutoModelForCausalLM

from shared.checkpoint.directory.open import open_checkpoint
from tools.rlhf.algorithms import grpo

STEPS = 14


def flags(world, target, **changes):
    usual = {
        "source": world.policy, "prompts": world.prompts, "reward": world.reward("disturbed"), "target": world.root / target,
        "steps": STEPS, "max_new_tokens": 16, "learning_rate": 3e-3, "micro_batch_size": 32, "global_batch_size": 32,
        "save_every": 2,
    }  # fmt: skip
    return usual | changes


@pytest.fixture(scope="module")
def trained(world, rlhf):
    target = flags(world, "grpo")
    assert rlhf("grpo", **target) == 0
    return target["target"]


def means(rows):
    values = [row["reward"] for row in rows]
    return sum(values[:2]) / 2, sum(values[-3:]) / 3


def test_a_learnable_reward_rises_and_the_directory_samples_it(world, trained, metrics, sampled_red, load_exactly):
    first, last = means(metrics(trained))
    assert last > 3 * first
    load_exactly(AutoModelForCausalLM, trained)
    after = sampled_red(trained)
    assert after > 3 * sampled_red(world.policy)
    assert after == pytest.approx(last, abs=0.2)  # 48 replies to prompts of which an update sees four
    assert (trained / "generation_config.json").read_bytes() == (world.policy / "generation_config.json").read_bytes()


def test_at_learning_rate_zero_nothing_moves(world, rlhf, metrics, sampled_red):
    target = world.root / "grpo-control"
    assert rlhf("grpo", **flags(world, target, learning_rate=0.0, steps=5)) == 0
    first, last = means(metrics(target))
    assert last < 2.5 * first  # 32 replies an update, about 0.1 each
    assert sampled_red(target) == sampled_red(world.policy)


def test_a_stopped_run_resumes_to_the_same_result(world, rlhf, trained, metrics):
    target = flags(world, "grpo-stopped")
    world.order.write_text(str(int(signal.SIGTERM)))
    assert rlhf("grpo", **target) == 75
    assert not target["target"].exists()
    assert rlhf("grpo", **target) == 0
    assert metrics(target["target"]) == metrics(trained)
    assert not os.path.exists(f"{target['target']}.state")


def test_reward_models_and_messages(world, rlhf, reward_model, metrics, tmp_path):
    """Chat prompts go through the template; a reward model reads the sampled ids."""
    prompts = tmp_path / "chat.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "blue pink"}]}\n' * 4)
    target = tmp_path / "out"
    changes = {"prompts": prompts, "reward": f"2*model:{reward_model},{world.reward('red')}", "steps": 2, "epochs": 2}
    assert rlhf("grpo", **flags(world, target, **changes, kl_coefficient=0.1)) == 0
    first, second = metrics(target)
    assert first["reward"] == pytest.approx(2 * first["rewards/reward/mean"] + first["rewards/red/mean"], abs=1e-4)
    assert "reward" not in second  # an update on the same replies
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 0


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"generations": 5}, ["--global-batch-size 32", "--generations 5"]),
        ({"epochs": 3}, ["--save-every 2", "--epochs 3"]),
        ({"global_batch_size": 40}, ["--global-batch-size 40", "--micro-batch-size 32"]),
    ],
)
def test_mistakes_are_named(world, rlhf, capsys, changes, names):
    assert rlhf("grpo", **flags(world, "grpo-refused", **changes)) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in names), message
    assert not (world.root / "grpo-refused.state").exists()


def test_fewer_prompts_than_an_update_needs_are_refused(world, rlhf, capsys, tmp_path):
    """TRL drops the incomplete batch and makes no update."""
    prompts = tmp_path / "three.jsonl"
    prompts.write_text("".join(world.prompts.read_text().splitlines(keepends=True)[:3]))
    assert rlhf("grpo", **flags(world, tmp_path / "out", prompts=prompts)) == 2
    assert "3 prompt(s) and an update takes 4" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["three.jsonl"]


def test_a_trainer_that_ends_before_its_last_update_publishes_nothing(world, rlhf, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(grpo, "_check_prompts", lambda prompts, options: None)
    prompts = tmp_path / "three.jsonl"
    prompts.write_text("".join(world.prompts.read_text().splitlines(keepends=True)[:3]))
    target = tmp_path / "out"
    assert rlhf("grpo", **flags(world, target, prompts=prompts)) == 1
    assert f"after 0 of {STEPS} updates" in capsys.readouterr().err
    assert not target.exists()


def test_the_manifest_has_the_updates_made(trained):
    assert open_checkpoint(trained, kinds=("hf",), flag="--source").facts["updates"] == STEPS
