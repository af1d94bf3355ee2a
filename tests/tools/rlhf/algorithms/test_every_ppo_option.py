"""Options of `rlhf ppo` beside the plain recipe, each against its formula in float64, on engines of plain torch."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.tools.rlhf.algorithms.test_ppo_loop import PlainEngine, build, rows  # noqa: F401 -- a fixture
from tools.rlhf.algorithms import losses
from tools.rlhf.algorithms.experience import reply_logits, reply_values
from tools.rlhf.engines.deepspeed import DeepSpeedEngine, EngineOptions, initialize_distributed
from tools.rlhf.engines.shared_body import BACKWARDS, CriticOfBoth, PolicyOfBoth, PolicyWithValueHead
from tools.rlhf.models import load_policy, open_source
from tools.rlhf.pretraining_text import PretrainingText, read_pretraining_text
from tools.rlhf.rewards.running_moments import RewardScale, RunningMoments
from tools.rlhf.rewards.weighted_sum import Reward

NAN = math.nan


def test_moments_are_those_of_all_rewards_so_far():
    """Chan, Golub and LeVeque: in parts, as in one; NaN is no number. Float64."""
    chance = np.random.default_rng(0)
    parts = [
        chance.normal(3, 2, 7),
        chance.normal(-1, 5, 1),
        np.array([NAN, NAN]),
        np.append(chance.normal(0, 1, 9), NAN),
    ]
    moments = RunningMoments()
    for number, part in enumerate(parts):
        moments = moments.including(torch.from_numpy(part))
        so_far = np.concatenate(parts[: number + 1])
        so_far = so_far[~np.isnan(so_far)]
        assert moments.mean == pytest.approx(so_far.mean(), abs=1e-14)
        assert moments.deviation == pytest.approx(so_far.std(), abs=1e-14)
    two = RunningMoments().including(
        torch.tensor([1.0, 2.0]), lambda total: total * 2
    )  # two ranks with the same rewards
    assert (two.count, two.mean, two.deviation) == (4, 1.5, 0.5)


@pytest.mark.parametrize(("how", "clip"), [("none", 1.5), ("scale", None), ("standardise", 0.7)])
def test_rewards_are_scaled_then_clipped(how, clip):
    one, two = np.array([1.0, 4.0, -2.0]), np.array([0.5, 9.0])
    scale = RewardScale(how, clip, {})
    scale(torch.from_numpy(one), losses.one_process)
    again = RewardScale(how, clip, json.loads(json.dumps(scale.facts())))  # as a resumed run has it
    both = np.concatenate([one, two])
    wanted = {"none": two, "scale": two / both.std(), "standardise": (two - both.mean()) / both.std()}[how]
    wanted = wanted if clip is None else wanted.clip(-clip, clip)
    for each in (scale, again):
        assert each(torch.from_numpy(two), losses.one_process).tolist() == pytest.approx(wanted.tolist(), abs=1e-14)


def test_the_controller_is_zieglers():
    """arXiv:1909.08593, section 2.2, with K_beta = 1 / horizon."""
    for kl, target, horizon in ((3.0, 6.0, 10.0), (6.6, 6.0, 10.0), (100.0, 6.0, 25.0)):
        wanted = 0.2 * (1 + (1 / horizon) * min(max((kl - target) / target, -0.2), 0.2))
        assert losses.adapt_kl_coefficient(0.2, kl, target, horizon) == pytest.approx(wanted, abs=1e-15)


def test_entropy_and_update_kl_are_means_over_the_tokens():
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=chance, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.float64)
    p = torch.softmax(logits / 0.7, -1)
    wanted = -(p * p.log()).sum(-1)[mask.bool()].mean()
    assert losses.entropy_bonus(losses.token_entropies(logits, 0.7), mask, 8.0).item() == pytest.approx(
        wanted.item(), abs=1e-12
    )
    old, new = (torch.randn(2, 5, generator=chance, dtype=torch.float64) for _ in range(2))
    ratio = (new - old).exp()
    k3 = (ratio - 1 - ratio.log())[mask.bool()].mean()
    assert losses.update_kl(new, old, mask, 8.0).item() == pytest.approx(k3.item(), abs=1e-12)


def gradient_of(ppo, engine, backward):
    """The gradient that one micro-batch's `backward` leaves."""
    engine.module.zero_grad()
    backward()
    return {name: each.grad.clone() for name, each in engine.module.named_parameters() if each.grad is not None}


def test_the_policys_gradient_has_entropy_and_text_in_it(build, world, tmp_path):  # noqa: F811
    """`policy - c H + gamma NLL` of one micro-batch against autograd of the formula in float64."""
    ppo, _ = build(
        PlainEngine,
        tmp_path / "state",
        entropy_coefficient=0.3,
        pretraining_coefficient=2.5,
        pretraining_data=world.pairs,
    )
    ids = np.random.default_rng(1).integers(3, 90, 400)
    ppo = replace(ppo, pretraining=PretrainingText(ids=ids, length=20))
    experience, _ = ppo._experience(1, 0.05)
    ppo.actor.module.double()
    experience = replace(experience, log_probs=experience.log_probs.double() - 0.1)  # a ratio off 1, clipped for some
    text = next(ppo._texts(0))
    assert text.tolist() == [row.tolist() for row in ids.reshape(-1, 20)[torch_order(20, 0)[:2]]]
    part, old = (
        experience.sequences.rows(torch.arange(2)),
        (torch.arange(2), slice(experience.sequences.reply_mask.shape[1])),
    )
    part_columns = part.reply_mask.shape[1]
    old = (torch.arange(2), slice(part_columns))
    tokens = kept = torch.tensor(9.0)
    model = ppo.actor.module
    found = gradient_of(ppo, ppo.actor, lambda: ppo._policy_backward(experience, old, part, text, tokens, kept))

    def formula():
        logits = reply_logits(model, part)
        log_p = torch.log_softmax(logits, -1)
        own = log_p.gather(-1, part.reply_ids[..., None])[..., 0]
        ratio = (own - experience.log_probs[old]).exp()
        advantage, mask = experience.advantages[old], part.reply_mask
        policy = -(torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) * mask).sum() / 9
        entropy = (-(log_p.exp() * log_p).sum(-1) * mask).sum() / 9
        scores = model(input_ids=text, use_cache=False).logits[:, :-1]
        nll = functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), text[:, 1:].reshape(-1), reduction="sum")
        (policy - 0.3 * entropy + 2.5 * nll / (4 * 19)).backward()

    wanted = gradient_of(ppo, ppo.actor, formula)
    assert found.keys() == wanted.keys()
    for name, each in found.items():
        assert torch.allclose(each, wanted[name], rtol=1e-6, atol=1e-9), name  # advantages are float32
    assert max(each.abs().max() for each in wanted.values()) > 1e-3


def torch_order(count, seed):
    from tools.rlhf.algorithms.ppo_loop import _order

    return list(_order(count, seed, 0, count))


def test_updates_end_where_the_policy_is_too_far(build, tmp_path, metrics):  # noqa: F811
    """The first mini-batch is at KL 0 before its update; the second is over any limit."""
    free, _ = build(PlainEngine, tmp_path / "free", learning_rate=1e-2)
    held, _ = build(PlainEngine, tmp_path / "held", learning_rate=1e-2, update_kl_limit=1e-4)
    for ppo in (free, held):
        replace(ppo, options=replace(ppo.options, steps=1)).train()
    one, two = rows(free, metrics)[0], rows(held, metrics)[0]
    assert (one["updates"], two["updates"]) == (4, 2)
    assert two["update_kl_max"] > 1e-4
    assert one["update_kl_max"] >= two["update_kl_max"]


def test_the_critic_alone_is_trained_first(build, tmp_path, metrics):  # noqa: F811
    ppo, record = build(PlainEngine, tmp_path / "state", critic_warmup_steps=2)
    before = ppo.critic.full_weights()
    ppo.train()
    same = [all(torch.equal(each[name], record.weights[0][name]) for name in each) for each in record.weights]
    assert same == [True, True, True, False]  # the weights that sampled
    found = rows(ppo, metrics)
    assert [row["policy_loss"] == 0 for row in found] == [True, True, False, False]
    assert found[1]["value_loss"] < found[0]["value_loss"]
    assert not all(torch.equal(each, before[name]) for name, each in ppo.critic.full_weights().items())


def test_scale_and_coefficient_resume(build, tmp_path, metrics):  # noqa: F811
    """Moments and the adaptive coefficient are in the state: two processes are one, to the bit."""
    changes = {"normalise_rewards": "standardise", "reward_clip": 0.9, "kl_horizon": 3.0}
    whole, _ = build(PlainEngine, tmp_path / "whole", **changes)
    whole.train()
    first, _ = build(PlainEngine, tmp_path / "parts", **changes, steps=2)
    first.train()
    second, _ = build(PlainEngine, tmp_path / "parts", **changes)
    second.train()
    assert rows(second, metrics) == rows(whole, metrics)
    assert second.state.facts(4) == whole.state.facts(4)
    assert second.state.facts(4)["rewards"]["count"] == 32
    # Half of the replies have reward 1, half 0: standardised they are 1 and -1.
    assert all(row["reward_learned"] == pytest.approx(0, abs=1e-6) for row in rows(whole, metrics))
    for before, after in pairwise(rows(whole, metrics)):  # a horizon of 3 iterations, a target of 0.5 nats
        error = min(max(before["kl_reply"] / 0.5 - 1, -0.2), 0.2)
        assert after["kl_coefficient"] == pytest.approx(before["kl_coefficient"] * (1 + error / 3), rel=1e-12)


def test_what_is_learned_from_is_the_scaled_reward(build, tmp_path):  # noqa: F811
    ppo, _ = build(PlainEngine, tmp_path / "state", reward_clip=0.25, whiten_advantages=False, gae_lambda=1.0)
    spec = ppo.options.rewards[0]
    tens = replace(ppo, reward=Reward([(spec, lambda prompts, replies: [10.0] * len(replies))]))
    experience, row = tens._experience(1, 0.0, tens._scale({}))
    assert (row["reward"], row["reward_learned"]) == (10.0, 0.25)
    mask = experience.sequences.reply_mask
    assert torch.allclose(experience.returns[mask.bool()], torch.tensor(0.25))


@pytest.mark.parametrize("kind", [PlainEngine, DeepSpeedEngine])
def test_a_shared_critic_is_one_model_with_both_losses(build, world, tmp_path, kind):  # noqa: F811
    ppo, _ = build(PlainEngine, tmp_path / "state", shared_critic=True)
    source = open_source(world.policy)
    settings = EngineOptions(
        zero=0, precision="fp32", micro_batch_size=2, accumulation=BACKWARDS * 2, max_gradient_norm=1e9
    )
    both = kind(PolicyWithValueHead(load_policy(source, torch.float32)), settings, initialize_distributed())
    ppo = replace(ppo, actor=PolicyOfBoth(both), critic=CriticOfBoth(both, 0.5))
    ids = torch.randint(3, 90, (2, 9))
    torch.nn.init.ones_(both.module.head.weight)
    with torch.no_grad():
        states = load_policy(source, torch.float32).model(ids).last_hidden_state
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(9).expand(2, 9),
        }
        assert torch.equal(ppo.critic(**inputs), states.sum(-1)) or torch.allclose(
            ppo.critic(**inputs), states.sum(-1), atol=1e-4
        )
    if kind is PlainEngine:  # DeepSpeed keeps gradients to itself
        ppo.critic.backward(ppo.critic(**inputs).sum())
        wanted = 0.5 * states.sum((0, 1))  # the value coefficient
        assert torch.allclose(both.module.head.weight.grad[0], wanted, rtol=1e-4, atol=1e-4)
        both.module.zero_grad()
    torch.nn.init.zeros_(both.module.head.weight)
    assert ppo.actor.full_weights().keys() == load_policy(source, torch.float32).state_dict().keys()
    assert list(ppo.critic.full_weights()) == ["head.weight"]
    before = both.full_weights()
    ppo.train()
    after = both.full_weights()
    assert all(not torch.equal(after[name], before[name]) for name in ("head.weight", "policy.model.norm.weight"))
    with torch.no_grad():
        assert reply_values(ppo.critic, ppo.sampler.rollouts[-1].sequences).abs().max() > 0


def test_text_is_read_from_rows_and_from_a_prepared_dataset(world, tmp_path):
    source = open_source(world.policy)
    file = tmp_path / "text.jsonl"
    texts = [" red blue green pink", " white", " black brown"] * 4
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ids = [token for text in texts for token in (*source.tokenizer(text)["input_ids"], source.tokenizer.eos_token_id)]
    read = read_pretraining_text(file, source, 6)
    assert len(read) == len(ids) // 6
    assert read.rows([1, 0]).tolist() == [ids[6:12], ids[:6]]
    prepared = tmp_path / "prepared"
    prepare(file, world.policy, prepared)
    assert read_pretraining_text(prepared, source, 6).rows([1, 0]).tolist() == [ids[6:12], ids[:6]]


def prepare(file, policy, target):
    """`pretrain prepare`, in its own environment."""
    pretrain = Path(__file__).resolve().parents[4] / "tools/pretrain/.venv/bin/pretrain"
    flags = [f"--source={file}", f"--tokenizer={policy}", f"--target={target}", "--workers=1"]
    subprocess.run([pretrain, "prepare", *flags], check=True, capture_output=True)


WRONG = [
    ({"kl_horizon": 5}, "--kl-horizon"),
    ({"critic_warmup_steps": 4}, "--critic-warmup-steps 4 leaves none"),
    ({"pretraining_coefficient": 2}, "--pretraining-coefficient is of --pretraining-data"),
    ({"pretraining_length": 8}, "--pretraining-length is of --pretraining-data"),
    ({"value_coefficient": 0.5}, "--value-coefficient is of --shared-critic"),
    ({"shared_critic": True, "critic_warmup_steps": 1}, "--critic-warmup-steps is of a critic with a body"),
    ({"shared_critic": True, "critic_learning_rate": 1}, "--critic-learning-rate is of a critic with a body"),
    ({"offload": True}, "--offload moves the states that ZeRO shards"),
    ({"offload": True, "zero": 2}, "there is no GPU here"),
    ({"pretraining_data": "prompts"}, "no 'text'"),
    ({"pretraining_data": "few"}, "fewer than a row of 96"),
    ({"pretraining_data": "few", "pretraining_length": 97}, "above the model's context of 96"),
]


@pytest.mark.parametrize(("flags", "words"), WRONG)
def test_wrong_flags_are_one_line(world, rlhf, capsys, flags, words):
    (world.root / "few.jsonl").write_text('{"text": " red"}\n')
    if name := flags.get("pretraining_data"):
        flags = flags | {"pretraining_data": world.root / f"{name}.jsonl"}
    target = world.root / "refused-ppo"
    given = {
        "source": world.policy,
        "prompts": world.prompts,
        "reward": world.reward("red"),
        "target": target,
        "steps": 4,
    }
    assert rlhf("ppo", **given | {"max_new_tokens": 8} | flags) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not target.exists()


def test_all_together_with_adapters_resume_to_the_same_result(world, rlhf, metrics):
    """Shared critic, text, entropy, scaled rewards, recomputed layers and LoRA in one run, stopped once."""
    flags = {
        "source": world.policy, "prompts": world.prompts, "reward": world.reward("disturbed"), "steps": 4, "lora_rank": 4,
        "max_new_tokens": 8, "learning_rate": 1e-2, "micro_batch_size": 8, "rollout_batch_size": 16, "global_batch_size": 16,
        "epochs": 1, "save_every": 1, "shared_critic": True, "entropy_coefficient": 0.01, "normalise_rewards": "scale",
        "pretraining_data": world.root / "text.jsonl", "gradient_checkpointing": True, "update_kl_limit": 1.0,
    }  # fmt: skip
    (world.root / "text.jsonl").write_text('{"text": " red blue green pink white black brown orange"}\n' * 40)
    whole, stopped = world.root / "ppo-all", world.root / "ppo-all-stopped"
    assert rlhf("ppo", **flags, target=whole) == 0
    world.order.write_text("10")  # SIGUSR1
    assert rlhf("ppo", **flags, target=stopped) == 75
    assert rlhf("ppo", **flags, target=stopped) == 0
    assert metrics(stopped) == metrics(whole)
    names = [place / "adapter_model.safetensors" for place in (whole, stopped)]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert metrics(whole)[-1]["pretraining_loss"] < metrics(whole)[0]["pretraining_loss"]
