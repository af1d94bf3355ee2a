"""`rlhf grpo`: a learnable reward rises, a control stays flat, the published policy samples it, a stopped run resumes."""

import json
import os
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from shared.checkpoint.directory.open import open_checkpoint
from tools.rlhf.algorithms import group_training, ppo
from tools.rlhf.models import load_policy

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


def test_a_stopped_run_resumes_to_the_same_result(world, rlhf, trained, metrics, recomputed):
    """Also with `--gradient-checkpointing`."""
    target = flags(world, "grpo-stopped")
    world.order.write_text(str(int(signal.SIGTERM)))
    assert rlhf("grpo", **target) == 75
    assert not target["target"].exists()
    assert rlhf("grpo", **target, gradient_checkpointing=True) == 0
    assert recomputed == [2]
    assert metrics(target["target"]) == metrics(trained)
    assert not os.path.exists(f"{target['target']}.state")


def test_reward_models_and_messages(world, rlhf, reward_model, metrics, tmp_path):
    """Chat prompts go through the template; a reward model reads the sampled ids."""
    prompts = tmp_path / "chat.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "blue pink"}]}\n' * 4)
    target = tmp_path / "out"
    changes = {"prompts": prompts, "reward": f"2*model:{reward_model},{world.reward('red')}", "steps": 2, "epochs": 2}
    changes |= {"rollout_micro_batch_size": 12}
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
        ({"track": "mlflow"}, ["--track mlflow", "install mlflow`"]),
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
    monkeypatch.setattr(group_training, "_check_prompts", lambda prompts, options: None)
    prompts = tmp_path / "three.jsonl"
    prompts.write_text("".join(world.prompts.read_text().splitlines(keepends=True)[:3]))
    target = tmp_path / "out"
    assert rlhf("grpo", **flags(world, target, prompts=prompts)) == 1
    assert f"after 0 of {STEPS} updates" in capsys.readouterr().err
    assert not target.exists()


def test_the_manifest_has_the_updates_made(trained):
    assert open_checkpoint(trained, kinds=("hf",), flag="--source").facts["updates"] == STEPS


# Every kind of setting with which `generate` changes the distribution.
SHAPED = {
    "repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "top_k": 3, "top_p": 0.5, "min_p": 0.3, "typical_p": 0.4,
    "epsilon_cutoff": 0.2, "eta_cutoff": 0.2, "suppress_tokens": [5, 6], "begin_suppress_tokens": [7],
    "bad_words_ids": [[8]], "min_new_tokens": 14, "exponential_decay_length_penalty": [1, 2.0],
    "sequence_bias": [[[9], -5.0]], "forced_eos_token_id": 1, "temperature": 0.3, "do_sample": True,
    "encoder_repetition_penalty": 1.5, "top_h": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_settings_of_generation_config_do_not_shape_the_roll_outs(world, rlhf, metrics, tmp_path, command):
    source = tmp_path / "policy"
    shutil.copytree(world.policy, source)
    file = source / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SHAPED))
    runs = []
    for policy, target in ((world.policy, tmp_path / "plain"), (source, tmp_path / "shaped")):
        changes = {"source": policy, "steps": 1, "save_every": 1, "learning_rate": 0.0, "reward": world.reward("red")}
        changes |= {"rollout_batch_size": 32, "micro_batch_size": 16} if command == "ppo" else {"kl_coefficient": 0.1}
        assert rlhf(command, **flags(world, target, **changes)) == 0
        runs.append(metrics(target))
    assert runs[0] == runs[1]
    assert (tmp_path / "shaped" / file.name).read_bytes() == file.read_bytes()


def test_dropout_is_off(world, rlhf, metrics, tmp_path):
    """OPT has dropout by its configuration. At learning rate 0 the policy is the source: its KL from it is 0."""
    source = tmp_path / "policy"
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    }
    OPTForCausalLM(
        OPTConfig(
            **sizes, vocab_size=200, max_position_embeddings=96, dropout=0.1, attention_dropout=0.1, init_std=0.5,
            eos_token_id=1, pad_token_id=0, bos_token_id=None,
        )
    ).save_pretrained(source)  # fmt: skip
    AutoTokenizer.from_pretrained(world.policy).save_pretrained(source)
    target = tmp_path / "out"
    changes = {"source": source, "steps": 2, "learning_rate": 0.0, "kl_coefficient": 0.1, "reward": world.reward("red")}
    assert rlhf("grpo", **flags(world, target, **changes)) == 0
    assert [row["kl"] for row in metrics(target)] == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_a_sampler_of_another_distribution_is_an_error(world, rlhf, capsys, monkeypatch, tmp_path, command):
    def penalized(source, dtype):
        model = load_policy(source, dtype)
        model.generation_config.no_repeat_ngram_size = 1
        return model

    monkeypatch.setattr(group_training if command == "grpo" else ppo, "load_policy", penalized)
    changes = {"reward": world.reward("red")} | ({"rollout_batch_size": 32} if command == "ppo" else {})
    assert rlhf(command, **flags(world, tmp_path / "out", **changes)) == 1
    assert "nats a token before the first update (--log-prob-gap-limit 0.001)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
