"""The PPO loop with fakes: engines of plain torch, scripted replies, a publisher that records versions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import StageError
from tools.rlhf.algorithms.experience import policy_log_probs
from tools.rlhf.algorithms.ppo_loop import PPO
from tools.rlhf.data import Prompt, read_prompts
from tools.rlhf.engines.deepspeed import DeepSpeedEngine, EngineOptions, initialize_distributed
from tools.rlhf.engines.engine import Engine
from tools.rlhf.models import load_critic, load_policy, open_source
from tools.rlhf.ppo_options import PPOOptions
from tools.rlhf.rewards.weighted_sum import Reward
from tools.rlhf.rollout.rollout import Reply, Rollout, Sequences
from tools.rlhf.state import State

REPLIES = (" red red red", " blue green pink white blue")
SAMPLER_LOG_PROB = -1.5  # what the script says of every token


class PlainEngine:
    """An `Engine` of torch alone, for one process."""

    def __init__(self, model: torch.nn.Module, options: EngineOptions, distributed: Any) -> None:
        self.module = model.eval()
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self._limit = options.max_gradient_norm
        self._norm = 0.0

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self._norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._limit))
        self._optimizer.step()
        self._optimizer.zero_grad()

    def gradient_norm(self) -> float | None:
        return self._norm

    def set_learning_rate(self, rate: float) -> None:
        self._optimizer.param_groups[0]["lr"] = rate

    def full_weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.module.state_dict().items()}

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        torch.save((self.module.state_dict(), self._optimizer.state_dict()), directory / "engine.pt")

    def load(self, directory: Path) -> None:
        weights, optimizer = torch.load(directory / "engine.pt")
        self.module.load_state_dict(weights)
        self._optimizer.load_state_dict(optimizer)


class Record:
    """A `Publisher` and a `Sampler` that note what is asked of them, in one list."""

    def __init__(self, tokenizer: Any) -> None:
        self.events: list[tuple[str, Any]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.rollouts: list[Rollout] = []
        self._tokenizer = tokenizer

    def publish(self, policy: Engine, version: int) -> None:
        self.events.append(("publish", version))
        self.weights.append(policy.full_weights())

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> Rollout:
        self.events.append(("sample", seed))
        texts = [REPLIES[number % 2] for number in range(len(prompts))]
        replies = [(*self._tokenizer(text)["input_ids"], 1) for text in texts]
        before, after = max(len(p.ids) for p in prompts), max(map(len, replies))
        rows = [
            [0] * (before - len(p.ids)) + [*p.ids, *r] + [0] * (after - len(r))
            for p, r in zip(prompts, replies, strict=True)
        ]
        mask = torch.tensor([[1.0] * len(r) + [0.0] * (after - len(r)) for r in replies])
        starts = torch.tensor([[0] * (before - len(p.ids)) + [1] * len(p.ids) for p in prompts])
        self.rollouts.append(
            Rollout(
                prompts=tuple(prompts),
                replies=tuple(Reply(ids=r, text=text, ended=True) for r, text in zip(replies, texts, strict=True)),
                sequences=Sequences(
                    ids=torch.tensor(rows), attention_mask=torch.cat([starts, mask.long()], dim=1), reply_mask=mask
                ),
                sampler_log_probs=SAMPLER_LOG_PROB * mask,
            )
        )
        return self.rollouts[-1]


@pytest.fixture(scope="module")
def build(world):
    """A run of 4 iterations of 8 replies, 2 epochs of 2 updates of 2 micro-batches."""
    source = open_source(world.policy)
    prompts = read_prompts(world.prompts, source.tokenizer, context_length=source.context_length, max_new_tokens=16)
    options = PPOOptions(
        source=world.policy, prompts=world.prompts, reward=world.reward("red"), target=world.root / "loop", steps=4,
        max_new_tokens=16, rollout_batch_size=8, global_batch_size=4, micro_batch_size=2, learning_rate=1e-3, kl_target=0.5,
    )  # fmt: skip
    engine = EngineOptions(zero=0, precision="fp32", micro_batch_size=2, accumulation=2, max_gradient_norm=1.0)
    distributed = initialize_distributed()

    def red(_: Sequence[Prompt], replies: Sequence[Reply]) -> list[float]:
        return [float("red" in reply.text) for reply in replies]

    def make(kind: type, state: Path, **changes: Any) -> tuple[PPO, Record]:
        record = Record(source.tokenizer)
        ppo = PPO(
            options=replace(options, **changes),
            prompts=prompts,
            actor=kind(load_policy(source, torch.float32), engine, distributed),
            critic=kind(
                load_critic(world.policy, torch.float32, vocab_size=source.config.vocab_size), engine, distributed
            ),
            reference=load_policy(source, torch.float32),
            reward=Reward([(options.rewards[0], red)]),
            sampler=record,
            publisher=record,
            state=State(state, fingerprint="this run"),
            distributed=distributed,
        )
        return ppo, record

    return make


def rows(ppo: PPO, metrics) -> list[dict[str, float]]:
    return metrics(ppo.state.path)


@pytest.fixture(scope="module")
def plain(build, tmp_path_factory):
    ppo, record = build(PlainEngine, tmp_path_factory.mktemp("plain") / "state")
    ppo.train()
    return ppo, record


def test_every_version_is_published_before_its_roll_out(plain):
    _, record = plain
    assert [kind for kind, _ in record.events] == ["publish", "sample"] * 4
    assert [version for kind, version in record.events if kind == "publish"] == [0, 1, 2, 3]
    seeds = [seed for kind, seed in record.events if kind == "sample"]
    assert len(set(seeds)) == 4
    name = "model.layers.0.mlp.up_proj.weight"
    for before, after in zip(record.weights, record.weights[1:], strict=False):
        assert not torch.equal(before[name], after[name])
    assert len({prompt.ids for rollout in record.rollouts for prompt in rollout.prompts}) > 16


def test_the_policy_learns_from_the_samplers_replies(plain, metrics):
    ppo, record = plain
    sequences = record.rollouts[0].sequences
    with torch.no_grad():
        before = policy_log_probs(ppo.reference, sequences, 1.0)
        after = policy_log_probs(ppo.actor, sequences, 1.0)
    change = ((after - before) * sequences.reply_mask).sum(-1)
    assert change[0::2].min() > 0.3  # the rewarded replies
    assert change[1::2].max() < 0
    gap = ((before - SAMPLER_LOG_PROB).abs() * sequences.reply_mask).sum() / sequences.reply_mask.sum()
    first = rows(ppo, metrics)[0]
    assert first["log_prob_gap"] == pytest.approx(gap.item(), rel=1e-5)  # float32, in micro-batches
    assert first["reward"] == 0.5
    assert first["kl_reply"] == pytest.approx(0, abs=1e-5)  # by the trainer's log-probabilities, not the sampler's


def test_deepspeed_and_plain_torch_are_the_same_run(plain, build, metrics, tmp_path):
    ppo, record = build(DeepSpeedEngine, tmp_path / "state")
    ppo.train()
    assert record.events == plain[1].events
    for one, other in zip(rows(ppo, metrics), rows(plain[0], metrics), strict=True):
        assert one == pytest.approx(
            {name: other[name] for name in one}, rel=1e-3, abs=1e-5
        )  # Adam amplifies float32's last digits
    ours, theirs = ppo.actor.full_weights(), plain[0].actor.full_weights()
    assert ours.keys() <= theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=2e-4), name  # of weights that moved by about 1.6e-2


def test_a_resumed_run_is_the_same_run(plain, build, metrics, tmp_path):
    first, _ = build(PlainEngine, tmp_path / "state", steps=2)
    first.train()
    second, record = build(PlainEngine, tmp_path / "state")
    second.train()
    assert [version for kind, version in record.events if kind == "publish"] == [2, 3]
    assert rows(second, metrics) == rows(plain[0], metrics)
    assert second.state.facts(4) == plain[0].state.facts(4)


def test_a_reply_without_an_opinion_is_not_learned_from(build, tmp_path):
    ppo, _ = build(PlainEngine, tmp_path / "state")
    spec = ppo.options.rewards[0]

    def some(_: Sequence[Prompt], replies: Sequence[Reply]) -> list[float]:
        return [1.0 if "red" in reply.text else math.nan for reply in replies]

    experience, row = replace(ppo, reward=Reward([(spec, some)]))._experience(1, 0.05)
    assert row["reward"] == row["reward/red"] == 1.0  # the mean over those with one
    assert not experience.advantages[1::2].any()
    assert torch.equal(experience.returns[1::2], experience.values[1::2])
    assert experience.advantages[0::2].any()
    silent = replace(ppo, reward=Reward([(spec, lambda prompts, replies: [math.nan] * len(replies))]))
    with pytest.raises(StageError, match="no reward function had an opinion on a reply of iteration 1"):
        silent._experience(1, 0.05)


def test_a_gap_before_the_first_update_is_an_error(build, tmp_path):
    ppo, _ = build(PlainEngine, tmp_path / "state")
    with pytest.raises(StageError, match="before the first update"):
        replace(ppo, log_prob_gap_limit=1e-3).train()


def test_a_gap_after_an_update_is_another_error(build, tmp_path):
    """The sampler keeps the first weights: what it says of its tokens is right once."""
    ppo, record = build(PlainEngine, tmp_path / "state", learning_rate=1e-2)
    whole = record.sample

    def sample(prompts: Sequence[Prompt], *, seed: int) -> Rollout:
        rollout = whole(prompts, seed=seed)
        with torch.no_grad():
            known = policy_log_probs(ppo.reference, rollout.sequences, 1.0) * rollout.sequences.reply_mask
        return replace(rollout, sampler_log_probs=known)

    record.sample = sample
    with pytest.raises(StageError, match="the sampler has other weights than the trainer"):
        replace(ppo, log_prob_gap_limit=1e-3).train()
    assert [version for kind, version in record.events if kind == "publish"] == [0, 1]  # within one iteration


def test_weights_of_the_correction_reach_the_update(build, tmp_path, metrics):
    """The sampler's log-probabilities are wrong by far: every token is dropped, and the policy stays; the critic learns."""
    kept, _ = build(PlainEngine, tmp_path / "kept")
    dropped, _ = build(PlainEngine, tmp_path / "dropped", importance_correction="sequence_mask")
    for ppo in (kept, dropped):
        replace(ppo, options=replace(ppo.options, steps=2)).train()
    assert [row["importance_dropped"] for row in rows(dropped, metrics)] == [1.0, 1.0]
    assert all("importance_dropped" not in row for row in rows(kept, metrics))
    reference = dropped.reference.state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in dropped.actor.full_weights().items())
    assert not all(torch.equal(tensor, reference[name]) for name, tensor in kept.actor.full_weights().items())
    assert rows(dropped, metrics)[0]["value_loss"] == rows(kept, metrics)[0]["value_loss"]
    assert rows(dropped, metrics)[0]["policy_loss"] == 0


def test_tokens_of_weight_0_leave_the_denominator(build, tmp_path):
    """The sampler is right about every other reply. The ratio to the old policy is 1 in a single update."""
    ppo, record = build(
        PlainEngine, tmp_path / "state", importance_correction="sequence_mask", epochs=1, global_batch_size=8
    )
    whole = record.sample

    def sample(prompts: Sequence[Prompt], *, seed: int) -> Rollout:
        rollout = whole(prompts, seed=seed)
        with torch.no_grad():
            known = policy_log_probs(ppo.actor, rollout.sequences, 1.0) * rollout.sequences.reply_mask
        known[1::2] -= 1
        return replace(rollout, sampler_log_probs=known)

    record.sample = sample
    experience, row = ppo._experience(1, 0.05)
    mask = experience.sequences.reply_mask
    kept = mask[0::2].sum()
    assert row["importance_dropped"] == pytest.approx(1 - (kept / mask.sum()).item())
    expected = -experience.advantages[0::2].sum() / kept
    assert ppo._update(experience, 1)["policy_loss"] == pytest.approx(expected.item(), rel=1e-4)  # float32
