"""`--zero` of the commands on TRL: processes that share optimizer state, gradients or weights are one process."""

from __future__ import annotations

import json
import signal

import pytest
from safetensors.torch import load_file

# One process and two add up in another order, in float32; Adam divides small gradients by their own size.
TOLERANCE = 1e-5


def test_dpo_with_sharded_weights_is_one_process(world, rlhf, process, metrics):
    flags = {
        "source": world.policy,
        "data": world.pairs,
        "learning_rate": 1e-3,
        "micro_batch_size": 16,
        "validation_fraction": 0.2,  # 192 pairs in 6 whole updates: accelerate fills a part of one up with pairs of the first
    }
    one, two = world.root / "dpo-one", world.root / "dpo-zero-3"
    assert rlhf("dpo", **flags, target=one) == 0
    shared = process("dpo", **flags, target=two, zero=3, processes=2)
    assert shared.returncode == 0, shared.stderr
    assert "ZeRO stage 3" in shared.stderr
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        for name in ("loss", "rewards/margins", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE, abs=TOLERANCE), name
    ours, theirs = (load_file(place / "model.safetensors") for place in (two, one))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 10 * TOLERANCE, name  # weights that moved by up to 7e-3


def test_grpo_with_sharded_weights_resumes_to_the_same_result(world, process, metrics):
    """SIGKILL of a process in the third roll-out; then the same command."""
    usual = {
        "source": world.policy,
        "prompts": world.prompts,
        "reward": world.reward("disturbed"),
        "learning_rate": 1e-3,
    }
    usual |= {"micro_batch_size": 8, "steps": 4, "global_batch_size": 16, "max_new_tokens": 12, "kl_coefficient": 0.01}
    usual |= {"save_every": 1, "zero": 3, "processes": 2}
    whole, killed = world.root / "grpo-zero", world.root / "grpo-zero-killed"
    done = process("grpo", **usual, target=whole)
    assert done.returncode == 0, done.stderr
    assert max(row["log_prob_gap"] for row in metrics(whole)) < 1e-5
    before, after = (load_file(place / "model.safetensors") for place in (world.policy, whole))
    assert sum(not before[name].equal(after[name]) for name in before) >= len(before) - 1
    world.order.write_text(str(int(signal.SIGKILL)))
    assert process("grpo", **usual, target=killed).returncode not in (0, 2)
    assert not killed.exists()
    shards = list(killed.with_name("grpo-zero-killed.state").rglob("zero_pp_rank_?_mp_rank_00_model_states.pt"))
    assert sorted(path.name[13] for path in shards) == ["0", "1"], "each process saves its part of the weights"
    done = process("grpo", **usual, target=killed)
    assert done.returncode == 0, done.stderr
    assert "resuming after update 2" in done.stderr
    assert metrics(killed) == metrics(whole)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_reward_model_with_sharded_gradients(world, process):
    target = world.root / "reward-zero"
    done = process(
        "reward",
        source=world.policy,
        data=world.pairs,
        target=target,
        learning_rate=1e-3,
        micro_batch_size=8,
        zero=2,
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accuracy_after"] > 0.8
    before, after = (load_file(place / "model.safetensors") for place in (world.policy, target))
    assert sum(not before[name].equal(after[name]) for name in before.keys() & after.keys()) >= len(before) - 1


def test_kto_with_sharded_gradients_learns_what_was_preferred(world, process, metrics, sampled_red):
    """Rows that make no whole micro-batch of both processes are dropped; layers are recomputed."""
    target = world.root / "kto-zero"
    flags = {"source": world.policy, "data": world.pairs, "learning_rate": 1e-3, "micro_batch_size": 8}
    done = process("kto", **flags, target=target, zero=2, processes=2, gradient_checkpointing=True, epochs=0.5)
    assert done.returncode == 0, done.stderr
    (found,) = (line for line in done.stderr.splitlines() if line.startswith("memory    policy"))
    assert all(word in found for word in ("weights", "gradients", "main weights", "moments"))
    assert metrics(target)[-1]["loss"] < metrics(target)[0]["loss"]
    assert sampled_red(target) > 1.5 * sampled_red(world.policy)
