"""`--zero` of the commands on TRL: processes that share optimizer state, gradients or weights are one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.tools.rlhf.dying_rank import REWARD

ROOT = Path(__file__).resolve().parents[4]

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


def test_grpo_with_sharded_weights_resumes_to_the_same_result_after_a_dead_rank(world, process, metrics, tmp_path):
    """SIGKILL of a rank in the second update, then SIGSTOP in the third; and the same command each time."""
    order, rewards = tmp_path / "order", tmp_path / "rewards.py"
    rewards.write_text(REWARD.format(order=str(order)))
    usual = {"source": world.policy, "prompts": world.prompts, "reward": f"py:{rewards}:reds", "learning_rate": 1e-3}
    usual |= {"micro_batch_size": 8, "steps": 4, "global_batch_size": 16, "max_new_tokens": 12, "kl_coefficient": 0.01}
    usual |= {"save_every": 1, "zero": 3, "processes": 2}
    whole, died = tmp_path / "whole", tmp_path / "died"
    done = process("grpo", **usual, target=whole)
    assert done.returncode == 0, done.stderr
    assert max(row["log_prob_gap"] for row in metrics(whole)) < 1e-5
    before, after = (load_file(place / "model.safetensors") for place in (world.policy, whole))
    assert sum(not before[name].equal(after[name]) for name in before) >= len(before) - 1

    for update, fault, said in (
        (1, signal.SIGKILL, "worker 1 was killed by SIGKILL"),
        (2, signal.SIGSTOP, "rank 1 hangs: for "),
    ):
        order.write_text(str(int(fault)))
        done = process("grpo", **usual, target=died, hang_timeout=8)
        assert time.time() - float(order.read_text()) < 60
        order.unlink()
        assert done.returncode == 1, done.stderr
        assert len([line for line in done.stderr.splitlines() if said in line]) == 1, done.stderr
        assert not died.exists()
        (state,) = (path.parent for path in died.with_name("died.state").rglob("complete"))
        assert state.name == f"checkpoint-{update}"
        shards = state.rglob("zero_pp_rank_?_mp_rank_00_model_states.pt")
        assert sorted(path.name[13] for path in shards) == ["0", "1"], "each process saves its part of the weights"
    assert "'update 3: rewards'" in done.stderr  # where it hangs
    done = process("grpo", **usual, target=died)
    assert done.returncode == 0, done.stderr
    assert "resuming after update 2" in done.stderr
    assert metrics(died) == metrics(whole)
    assert (died / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


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


WORKER = """
import json, sys
from pathlib import Path
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from tools.rlhf.algorithms import group_training, preference_training
from tools.rlhf.cli import tool
from tools.rlhf.engines import trl

def train(trainer, *rest):
    updates = trl.train(trainer, *rest)
    sharded = trainer.is_deepspeed_enabled
    print("STAGE", trainer.accelerator.deepspeed_engine_wrapped.engine.zero_optimization_stage() if sharded else 0)
    return updates

group_training.train = preference_training.train = train
for words in json.loads(Path(sys.argv[1]).read_text()):
    unset_hf_deepspeed_config()  # of the run before
    try:
        tool.run(words)
    except SystemExit as end:
        if end.code:
            raise
"""
STAGES = {"dpo": (0, 2), "kto": (0, 3), "rloo": (0, 2, 3)}


@pytest.fixture(scope="module")
def stages(world, tmp_path_factory):
    """Two updates of every command at its stages, one after the other in the same two processes; their targets."""
    work = tmp_path_factory.mktemp("stages")
    pairs = work / "pairs.jsonl"
    pairs.write_text("".join(world.pairs.read_text().splitlines(keepends=True)[:32]))
    given = {"source": world.policy, "learning_rate": 1e-3, "micro_batch_size": 8, "global_batch_size": 16}
    rows = {"data": pairs, "validation_fraction": 0}
    prompts = {
        "prompts": world.prompts,
        "reward": world.reward("red"),
        "steps": 2,
        "generations": 4,
        "max_new_tokens": 6,
    }
    flags = {"dpo": rows, "kto": rows | {"epochs": 0.5}, "rloo": prompts | {"temperature": 0.8}}
    runs = []
    for stage in (0, 2, 3):
        for command in [name for name, asked in STAGES.items() if stage in asked]:
            words = given | flags[command] | {"zero": stage, "target": work / f"{command}-{stage}"}
            runs.append([command, *(f"--{name.replace('_', '-')}={value}" for name, value in words.items())])
    (work / "runs.json").write_text(json.dumps(runs))
    (work / "worker.py").write_text(WORKER)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    job |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", work / "worker.py", work / "runs.json"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | job | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    said = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    for out, _ in said:
        found = [int(line.split()[1]) for line in out.splitlines() if line.startswith("STAGE")]
        assert found == [int(run[-2].removeprefix("--zero=")) for run in runs]
    return work


@pytest.mark.parametrize(
    ("command", "stage"), [(name, stage) for name, asked in STAGES.items() for stage in asked if stage]
)
def test_a_stage_is_the_same_training_as_none(world, stages, metrics, command, stage):
    """The processes of both hold the same rows, and sample with the same seeds; RLOO's reference is sharded, too."""
    plain, sharded = stages / f"{command}-0", stages / f"{command}-{stage}"
    one, other = metrics(plain), metrics(sharded)
    assert len(one) == len(other) == 2
    for ours, theirs in zip(other, one, strict=True):
        for name in ("loss", "grad_norm", *(("reward", "kl") if command == "rloo" else ("rewards/chosen",))):
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE, abs=TOLERANCE), name
    before, ours, theirs = (load_file(place / "model.safetensors") for place in (world.policy, sharded, plain))
    assert before.keys() == ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 10 * TOLERANCE, name  # weights that moved by up to 2e-3
    assert sum(not before[name].equal(ours[name]) for name in before) >= len(before) - 1
