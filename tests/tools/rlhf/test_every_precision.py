"""`--precision bf16`: every linear layer computes in bf16, main weights are float32, nothing else is held in float32."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tools.rlhf.algorithms.ppo_loop import PPO
from tools.rlhf.engines import preference_trainers
from tools.rlhf.rewards import weighted_sum

MAIN, HALF = "float32", "bfloat16"


@pytest.fixture
def computed(monkeypatch):
    """What linear layers compute: dtype of the weight, dtype of the output."""
    found, forward = set(), torch.nn.Linear.forward

    def watched(self, *inputs):
        output = forward(self, *inputs)
        found.add(tuple(str(each.dtype).removeprefix("torch.") for each in (self.weight, output)))
        return output

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    return found


@pytest.fixture
def rewards(monkeypatch):
    """The reward models of a command."""
    models, load = [], weighted_sum.load

    def watched(*arguments, **named):
        reward = load(*arguments, **named)
        models.extend(reward.models)
        return reward

    monkeypatch.setattr(weighted_sum, "load", watched)
    return models


def dtypes(model):
    return {str(each.dtype).removeprefix("torch.") for each in model.parameters()}


def moved(world, target):
    """Tensors that are not the source's, of as many; the published dtype is the source's."""
    before, after = (load_file(place / "model.safetensors") for place in (world.policy, target))
    common = before.keys() & after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    return sum(not before[name].equal(after[name]) for name in common), len(common)


@pytest.mark.parametrize("command", ["dpo", "reward"])
def test_on_rows(command, world, rlhf, metrics, trainers, computed, monkeypatch):
    """TRL's trainers hold the main weights alone, and compute in bf16 (autocast). DPO has no reference model."""
    monkeypatch.setattr(preference_trainers, "check_fused_log_probs", lambda *unused: None)  # compares in float32
    target = world.root / f"{command}-bf16"
    flags = {"source": world.policy, "data": world.pairs, "target": target, "learning_rate": 1e-3, "epochs": 0.3}
    flags |= {"validation_fraction": 0} if command == "dpo" else {"validation_fraction": 0.02}
    assert rlhf(command, **flags, precision="bf16") == 0
    (trainer,) = trainers
    assert dtypes(trainer.model) == {MAIN}
    assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {torch.float32}
    assert getattr(trainer, "ref_model", None) is None
    # The accuracy of a reward model is measured in float32, before and after training.
    assert computed == {(MAIN, HALF)} | ({(MAIN, MAIN)} if command == "reward" else set())
    changed, count = moved(world, target)
    assert changed >= count - 1
    rows = metrics(target)
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_on_rewards(command, world, rlhf, metrics, reward_model, trainers, computed, rewards, monkeypatch):
    """Reference and reward models are bf16, once; PPO's trained models are bf16 beside float32 main weights."""
    target, runs, train = world.root / f"{command}-bf16", [], PPO.train
    monkeypatch.setattr(PPO, "train", lambda self: (runs.append(self), train(self)))
    flags = {
        "source": world.policy, "prompts": world.prompts, "reward": f"model:{reward_model}", "target": target, "steps": 2,
        "max_new_tokens": 8, "learning_rate": 1e-3, "micro_batch_size": 8, "global_batch_size": 16, "kl_coefficient": 0.05,
    }  # fmt: skip
    flags |= {"rollout_batch_size": 16} if command == "ppo" else {"generations": 4}
    assert rlhf(command, **flags, precision="bf16") == 0
    (model,) = rewards
    assert dtypes(model) == {HALF}
    if command == "ppo":
        (run,) = runs
        assert dtypes(run.reference.module) == {HALF}
        for engine in (run.actor, run.critic):
            assert dtypes(engine.module) == {HALF}
            assert {state["exp_avg"].dtype for state in engine._engine.optimizer.optimizer.state.values()} == {
                torch.float32
            }
    else:
        (trainer,) = trainers
        assert dtypes(trainer.ref_model) == {HALF}
        assert dtypes(trainer.model) == {MAIN}
        assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {torch.float32}
    assert computed == {(HALF, HALF)} | ({(MAIN, HALF)} if command == "grpo" else set())
    changed, count = moved(world, target)
    assert changed >= count - 1
    assert all(1e-5 < row["log_prob_gap"] < 0.1 for row in metrics(target))  # in fp32, below 1e-5
