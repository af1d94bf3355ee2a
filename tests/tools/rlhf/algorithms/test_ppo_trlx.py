"""`rlhf ppo --backend trlx`: needs trlx at BATON_TRLX (`make test-trlx`); what is refused is tested without it."""

import json
import os
import signal
from itertools import pairwise
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.errors import StageError
from tests.trlx_checkout import needs_trlx
from tools.rlhf.algorithms.ppo_trlx import ScoredReplies
from tools.rlhf.data import Prompt
from tools.rlhf.models import open_source
from tools.rlhf.rewards.spec import RewardSpec
from tools.rlhf.rollout.in_process import InProcessSampler
from tools.rlhf.rollout.rollout import Reply

STEPS = 10


def flags(world, target, **changes):
    usual = {
        "source": world.policy, "prompts": world.prompts, "reward": world.reward("disturbed"), "target": world.root / target,
        "backend": "trlx", "steps": STEPS, "max_new_tokens": 16, "learning_rate": 2e-3, "micro_batch_size": 8,
        "kl_coefficient": 0.01, "rollout_batch_size": 32, "global_batch_size": 16, "save_every": 2,
    }  # fmt: skip
    return usual | changes


def test_every_reply_needs_a_number():
    """trlx learns from all of them: NaN would be learned from as 0, or spread."""
    spec = RewardSpec(weight=1.0, path=Path("rewards.py"), function="some")
    reward = ScoredReplies([(spec, lambda prompts, replies: [1.0, float("nan")])])
    prompts = [Prompt(text="a", ids=(2,))] * 2
    replies = [Reply(ids=(3,), text="b", ended=True)] * 2
    with pytest.raises(StageError, match="no function had an opinion on 1 of 2 replies, and --backend trlx"):
        reward(prompts, replies)
    total, _ = ScoredReplies([(spec, lambda prompts, replies: [1.0, 2.0])])(prompts, replies)
    assert total.tolist() == [1.0, 2.0]


@pytest.fixture(scope="module")
def trained(world, rlhf):
    target = flags(world, "trlx")
    assert rlhf("ppo", **target) == 0
    return target["target"]


@needs_trlx
def test_a_learnable_reward_rises_with_the_metrics_of_the_other_backend(world, rlhf, trained, metrics):
    rows = metrics(trained)
    assert len(rows) == STEPS
    assert sum(row["reward"] for row in rows[-3:]) / 3 > 3 * sum(row["reward"] for row in rows[:2]) / 2, rows
    assert rows[0]["kl_reply"] == pytest.approx(0, abs=1e-3)
    assert rows[-1]["kl_reply"] > 1
    assert max(row["log_prob_gap_max"] for row in rows) < 1e-3
    other = flags(world, "deepspeed", backend="deepspeed", steps=1)
    assert rlhf("ppo", **other) == 0
    (first,) = metrics(other["target"])
    assert set(first) <= set(rows[0])
    for name in ("reward", "entropy", "reply_tokens", "ended"):  # the same roll-out
        assert first[name] == pytest.approx(rows[0][name], rel=1e-6), name
    assert {path.name for path in trained.iterdir()} == {path.name for path in other["target"].iterdir()}
    assert json.loads((trained / "manifest.json").read_text())["facts"]["backend"] == "trlx"


@needs_trlx
def test_sampling_from_the_directory_shows_the_reward(world, trained, metrics, sampled_red, load_exactly):
    load_exactly(AutoModelForCausalLM, trained)
    assert sampled_red(trained) == pytest.approx(sum(row["reward"] for row in metrics(trained)[-3:]) / 3, abs=0.15)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (trained / name).read_bytes() == (world.policy / name).read_bytes()


@needs_trlx
def test_at_learning_rate_zero_nothing_moves(world, rlhf, metrics, sampled_red):
    target = flags(world, "trlx-control", learning_rate=0.0, steps=3)
    assert rlhf("ppo", **target) == 0
    rows = metrics(target["target"])
    assert all(abs(row["kl_reply"]) < 1e-3 and row["clip_fraction"] == 0 for row in rows)
    assert sampled_red(target["target"]) == sampled_red(world.policy)


@needs_trlx
def test_a_killed_and_a_stopped_run_resume_to_the_same_result(world, rlhf, process, trained, metrics):
    target = flags(world, "trlx-killed")
    world.order.write_text(str(int(signal.SIGKILL)))
    killed = process("ppo", **target)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    world.order.write_text(str(int(signal.SIGUSR1)))
    assert rlhf("ppo", **target) == 75
    assert not target["target"].exists()
    assert rlhf("ppo", **target) == 0
    assert metrics(target["target"]) == metrics(trained)
    assert (target["target"] / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


@needs_trlx
def test_a_damaged_state_is_refused(world, rlhf, capsys):
    target = flags(world, "trlx-damaged")
    world.order.write_text(str(int(signal.SIGTERM)))
    assert rlhf("ppo", **target) == 75
    (file,) = target["target"].with_name("trlx-damaged.state").glob("step_*/actor/trlx.pt")
    file.write_bytes(file.read_bytes()[:100])
    assert rlhf("ppo", **target) == 2
    assert f"{file} is no file" in capsys.readouterr().err.strip().splitlines()[-1]


@needs_trlx
def test_updates_see_the_sampled_ids(world, rlhf, monkeypatch):
    """Of replies that their text's tokens are not, too."""
    from tools.rlhf.engines import trlx_package

    trlx_package.import_trlx(trlx_package.locate())
    from tools.rlhf.engines.trlx_trainer import OwnExperienceTrainer

    sampled, trained_on = [], []
    sample, loss = InProcessSampler.sample, OwnExperienceTrainer.loss

    def noted_sample(self, *args, **kwargs):
        rollout = sample(self, *args, **kwargs)
        sampled.extend((prompt.ids, reply.ids) for prompt, reply in zip(rollout.prompts, rollout.replies, strict=True))
        return rollout

    def noted_loss(self, batch):
        for query, response in zip(batch.query_tensors.tolist(), batch.response_tensors.tolist(), strict=True):
            trained_on.append(tuple(tuple(t for t in ids if t != -1) for ids in (query, response)))
        return loss(self, batch)

    monkeypatch.setattr(InProcessSampler, "sample", noted_sample)
    monkeypatch.setattr(OwnExperienceTrainer, "loss", noted_loss)
    assert rlhf("ppo", **flags(world, "trlx-ids", steps=1, epochs=1, temperature=3.0)) == 0
    assert sorted(trained_on) == sorted(sampled)
    tokenizer = AutoTokenizer.from_pretrained(world.policy)
    again = [tuple(tokenizer(tokenizer.decode(ids, skip_special_tokens=True))["input_ids"]) for _, ids in sampled]
    assert any(ids[: len(other)] != other for (_, ids), other in zip(sampled, again, strict=True))


@pytest.fixture(scope="module")
def in_two(world, process):
    """Runs of three iterations in two processes, by name, ZeRO stage and changed flags; each is made once."""

    def run(name, zero, signal_number=None, **changes):
        given = flags(world, f"trlx-{name}-{zero}", steps=3, micro_batch_size=4, zero=zero, processes=2, **changes)
        if signal_number is not None:
            world.order.write_text(str(int(signal_number)))
            stopped = process("ppo", **given)
            assert stopped.returncode not in (0, 2), stopped.stderr
            assert not given["target"].exists()
        if not given["target"].exists():
            done = process("ppo", **given)
            assert done.returncode == 0, done.stderr
            assert f"2 process(es) on cpu, ZeRO stage {zero}" in done.stderr
            assert ("resuming after iteration" in done.stderr) == (signal_number is not None)
        return given["target"]

    return run


@needs_trlx
@pytest.mark.parametrize("zero", [2, 3])
def test_two_processes_sharded_or_not_are_the_same_run(in_two, metrics, load_exactly, zero):
    """DDP and accelerate's DeepSpeed plugin."""
    rows = []
    for stage in (0, zero):
        target = in_two("two", stage)
        load_exactly(AutoModelForCausalLM, target)
        rows.append(metrics(target))
    for one, other in zip(*rows, strict=True):
        for name in ("reward", "kl_reply", "policy_loss", "value_loss", "gradient_norm", "entropy"):
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name  # float32 sums in another order
    assert rows[0][-1]["kl_reply"] > 0.1


@needs_trlx
@pytest.mark.parametrize("zero", [2, 3])
def test_a_sharded_run_resumes_to_the_same_result(in_two, metrics, zero):
    """SIGKILL of a process in the third roll-out; then the same command."""
    whole, resumed = in_two("two", zero), in_two("killed", zero, signal.SIGKILL)
    assert metrics(resumed) == metrics(whole)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


LORA = {"lora_rank": 4, "learning_rate": 8e-3}


@pytest.fixture(scope="module")
def adapter(world, rlhf):
    target = flags(world, "trlx-lora", steps=5, **LORA)
    assert rlhf("ppo", **target) == 0
    return target["target"]


@needs_trlx
def test_an_adapter_learns_from_the_source_on(world, adapter, metrics, sampled_red):
    rows = metrics(adapter)
    assert rows[0]["kl"] == 0.0  # the reference is the adapter off, and B is 0
    assert rows[-1]["kl_reply"] > 0.1
    assert rows[-1]["reward"] > 1.3 * rows[0]["reward"]
    assert max(row["log_prob_gap"] for row in rows) < 1e-5
    stored = load_file(adapter / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 7  # A and B, layers, matrices of a layer
    assert all(tensor.abs().max() > 0 for tensor in stored.values())
    assert json.loads((adapter / "manifest.json").read_text())["facts"]["lora_rank"] == 4


@needs_trlx
def test_the_merged_policy_is_the_source_and_the_adapter(world, rlhf, adapter, sampled_red, load_exactly):
    target = flags(world, "trlx-merged", steps=5, publish="merged", **LORA)
    assert rlhf("ppo", **target) == 0
    load_exactly(AutoModelForCausalLM, target["target"])
    stored, merged, source = (
        load_file(place / file)
        for place, file in (
            (adapter, "adapter_model.safetensors"), (target["target"], "model.safetensors"), (world.policy, "model.safetensors"),
        )
    )  # fmt: skip
    for name in source:
        b = stored.get(f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight")
        exact = source[name]
        if b is not None:
            a = stored[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"]
            exact = (exact.double() + 2.0 * (b.double() @ a.double())).float()
        assert merged[name].equal(exact), name
    assert sampled_red(target["target"]) > 1.3 * sampled_red(world.policy)


@needs_trlx
def test_an_adapter_resumes_without_the_frozen_weights_in_its_state(world, rlhf, adapter, metrics):
    target = flags(world, "trlx-lora-stopped", steps=5, **LORA)
    world.order.write_text(str(int(signal.SIGUSR1)))
    assert rlhf("ppo", **target) == 75
    state = target["target"].with_name("trlx-lora-stopped.state")
    saved = sum(path.stat().st_size for path in state.rglob("*.pt"))
    head = 64 * 128 + 128 + 128 + 1
    trained = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values()) + head
    assert 12 * trained < saved < 12 * trained + 100_000, saved  # weights and two moments; pickles: names
    assert saved < (world.policy / "model.safetensors").stat().st_size
    assert rlhf("ppo", **target) == 0
    assert metrics(target["target"]) == metrics(adapter)
    files = [place / "adapter_model.safetensors" for place in (target["target"], adapter)]
    assert files[0].read_bytes() == files[1].read_bytes()


@needs_trlx
@pytest.mark.parametrize("zero", [2, 3])
def test_adapters_in_two_processes_sharded_or_not_are_the_same_run(in_two, metrics, zero):
    """The reference of a DDP model and of sharded weights is the source, too."""
    targets = in_two("lora", 0, **LORA), in_two("lora", zero, **LORA)
    rows, others = map(metrics, targets)
    assert rows[0]["kl"] == others[0]["kl"] == 0.0
    for target in targets:
        assert all(tensor.abs().max() > 0 for tensor in load_file(target / "adapter_model.safetensors").values())
    for one, other in zip(rows, others, strict=True):
        for name in ("reward", "kl_reply", "policy_loss", "value_loss", "entropy"):
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name  # float32 sums in another order


@needs_trlx
def test_adapters_of_a_sharded_run_resume_to_the_same_result(in_two, metrics):
    whole, resumed = in_two("lora", 3, **LORA), in_two("lora-killed", 3, signal.SIGKILL, **LORA)
    assert metrics(resumed) == metrics(whole)
    one, two = ((place / "adapter_model.safetensors").read_bytes() for place in (resumed, whole))
    assert one == two


@needs_trlx
def test_in_bf16_adapters_have_float32_main_weights(world, rlhf, metrics):
    """Frozen weights are bf16; the published numbers are no bf16 ones."""
    target = flags(world, "trlx-lora-bf16", steps=2, precision="bf16", **LORA)
    assert rlhf("ppo", **target) == 0
    stored = load_file(target["target"] / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert any(not tensor.equal(tensor.bfloat16().float()) for tensor in stored.values())
    rows = metrics(target["target"])
    assert rows[0]["kl"] == 0.0
    assert max(row["log_prob_gap"] for row in rows) < 0.1


@needs_trlx
def test_rewards_coefficient_and_held_out_prompts_are_those_of_our_loop(world, rlhf, metrics):
    clip, target_kl, horizon = 1.5, 6.0, 5.0
    target = flags(
        world, "trlx-loop", steps=3, kl_target=target_kl, kl_horizon=horizon, normalise_rewards="standardise",
        reward_clip=clip, validation_prompts=world.prompts, keep_best=True,
    )  # fmt: skip
    assert rlhf("ppo", **target) == 0
    rows = metrics(target["target"])
    for before, after in pairwise(rows):
        wanted = before["kl_coefficient"] * (1 + min(max(before["kl_reply"] / target_kl - 1, -0.2), 0.2) / horizon)
        assert after["kl_coefficient"] == pytest.approx(wanted, rel=1e-9)
    assert all(abs(row["reward_learned"]) < clip for row in rows)
    assert rows[0]["reward_learned"] == pytest.approx(0, abs=0.2)  # its mean is subtracted; clipped
    assert rows[0]["reward"] > 0.05
    assert rows[-1]["held_out_reward"] > 0
    open_source(target["target"] / "best")


@needs_trlx
def test_trlx_may_be_a_wheel(world, process, monkeypatch):
    place = Path(os.environ["BATON_TRLX"])
    if place.is_dir():
        wheel = world.root / "trlx-0.7.0-py3-none-any.whl"
        with ZipFile(wheel, "w") as archive:
            for file in sorted((place / "trlx").rglob("*.py")):
                archive.write(file, file.relative_to(place))
        monkeypatch.setenv("BATON_TRLX", str(wheel))
    done = process("ppo", **flags(world, "trlx-wheel", steps=1))
    assert done.returncode == 0, done.stderr
    assert ".whl, as it is" in done.stderr
