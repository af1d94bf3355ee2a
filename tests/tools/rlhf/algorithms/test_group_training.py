"""Losses and advantages of GRPO and RLOO are their papers', in float64."""

import math

import pytest
import torch
from datasets import Dataset

from tools.rlhf.algorithms import grpo, rloo
from tools.rlhf.engines.deepspeed import initialize_distributed
from tools.rlhf.models import keep_in_evaluation_mode, load_policy, open_source
from tools.rlhf.options import GRPOOptions, RLOOOptions

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
B, T = MASK.shape
EPSILON = 0.2


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def make(world, tmp_path_factory):
    """A trainer of TRL with an algorithm's settings; its rewards are a table."""
    source = open_source(world.policy)
    distributed = initialize_distributed()

    def trainer(algorithm, weights=(1.0,), beta=0.0):
        policy = load_policy(source, torch.float32)
        keep_in_evaluation_mode(policy)
        arguments = algorithm.config(
            output_dir=str(tmp_path_factory.mktemp("trainer")), use_cpu=True, bf16=False, report_to="none", beta=beta,
            num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=1, max_completion_length=10,
            gradient_checkpointing=False, reward_weights=list(weights), **algorithm.settings,
        )  # fmt: skip
        made = algorithm.trainer(
            distributed=distributed, log_prob_gap_limit=1e-3, model=policy, args=arguments,
            reward_funcs=[lambda **unused: [0.0]] * len(weights), processing_class=source.tokenizer,
            train_dataset=Dataset.from_list([{"prompt": "colors:"}] * 8), **algorithm.arguments,
        )  # fmt: skip
        made.model.train()
        made.current_gradient_accumulation_steps = 1
        return made

    return trainer


@pytest.fixture
def options(world):
    common = {"source": world.policy, "target": world.root / "none", "prompts": world.prompts}
    return lambda kind, **changes: kind(**common, reward=world.reward("red"), clip_range=EPSILON, **changes)


def batch(old):
    ids = torch.ones(B, T, dtype=torch.long)
    return {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": MASK,
        "num_items_in_batch": torch.tensor(17.0), **old,
    }  # fmt: skip


def given(log_probs):
    return lambda *unused, **named: (log_probs, torch.zeros_like(log_probs), None)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo"])
def test_every_loss_of_grpo_is_its_papers(make, options, loss):
    trainer = make(grpo.algorithm(options(GRPOOptions, loss=loss)))
    new, old, advantages = random(1, B, T) / 4 - 2, random(2, B, T) / 4 - 2, random(3, B)
    trainer._get_per_token_logps_and_entropies = given(new)
    found = trainer._compute_loss(None, batch({"old_per_token_logps": old, "advantages": advantages}))
    per_reply, clipped = [], 0
    for row in range(B):
        tokens = []
        for t in range(int(MASK[row].sum())):
            a, ratio = advantages[row].item(), math.exp(new[row, t] - old[row, t])
            if loss == "cispo":
                tokens.append(-min(ratio, 1 + EPSILON) * a * new[row, t].item())
            else:
                tokens.append(-min(ratio * a, min(max(ratio, 1 - EPSILON), 1 + EPSILON) * a))
            clipped += abs(ratio - 1) > EPSILON
        per_reply.append(tokens)
    assert clipped >= 3
    total, count = sum(map(sum, per_reply)), sum(map(len, per_reply))
    expected = {
        "dapo": total / 17,  # tokens of the whole update, of which this is a part
        "cispo": total / 17,
        "grpo": sum(sum(tokens) / len(tokens) for tokens in per_reply) / B,
        "bnpo": total / count,
        "dr_grpo": total / (B * 10),  # max_completion_length
    }[loss]
    assert found.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("correction", ["token_truncate", "token_mask", "sequence_mask"])
@pytest.mark.parametrize("loss", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo"])
def test_every_loss_of_grpo_is_weighed(make, options, loss, correction):
    """A token's loss times its weight; tokens of weight 0 are counted in no denominator but dr_grpo's constant."""
    trainer = make(grpo.algorithm(options(GRPOOptions, loss=loss, importance_correction=correction)))
    new, old, advantages = random(1, B, T) / 4 - 2, random(2, B, T) / 4 - 2, random(3, B)
    sampled = old + random(6, B, T) * 0.7
    output = batch({"old_per_token_logps": old, "advantages": advantages})
    row = trainer._correct(output, sampled, old, MASK)
    trainer._get_per_token_logps_and_entropies = given(new)
    found = trainer._compute_loss(None, output)
    per_reply, kept = [], 0
    for i in range(B):
        ratios = [math.exp(old[i, t] - sampled[i, t]) for t in range(int(MASK[i].sum()))]
        tokens = []
        for t, ratio in enumerate(ratios):
            a, r = advantages[i].item(), math.exp(new[i, t] - old[i, t])
            weight = math.prod(ratios) if correction == "sequence_mask" else ratio
            weight = min(weight, 2.0) if correction == "token_truncate" else weight * (0.5 <= weight <= 2.0)
            if weight == 0:
                continue
            plain = -min(r * a, min(max(r, 1 - EPSILON), 1 + EPSILON) * a)
            tokens.append(weight * (-min(r, 1 + EPSILON) * a * new[i, t].item() if loss == "cispo" else plain))
        per_reply.append(tokens)
        kept += len(tokens)
    assert row["importance_dropped"] == pytest.approx(1 - kept / MASK.sum().item())
    assert (kept < MASK.sum()) == (correction != "token_truncate")
    total = sum(map(sum, per_reply))
    expected = {
        "dapo": total / kept,
        "cispo": total / kept,
        "grpo": sum(sum(tokens) / max(len(tokens), 1) for tokens in per_reply) / B,
        "bnpo": total / kept,
        "dr_grpo": total / (B * 10),
    }[loss]
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_the_loss_of_rloo_clips_the_ratio_of_whole_replies(make, options):
    trainer = make(rloo.algorithm(options(RLOOOptions)))
    new, old, advantages = random(1, B, T) / 4 - 2, random(2, B) / 4, random(3, B)
    old = (new * MASK).sum(1) + old
    trainer._get_per_token_logps_and_entropies = given(new)
    found = trainer._compute_loss(None, batch({"old_logps": old, "advantages": advantages}))
    expected = 0.0
    for row in range(B):
        a, ratio = advantages[row].item(), math.exp(sum(new[row, : int(MASK[row].sum())].tolist()) - old[row].item())
        expected -= min(ratio * a, min(max(ratio, 1 - EPSILON), 1 + EPSILON) * a) / B
    assert found.item() == pytest.approx(expected, abs=1e-9)


def advantages_of(trainer, rewards):
    trainer._calculate_rewards = lambda *unused: rewards
    trainer._step = 0
    return trainer._generate_and_score_completions([{"prompt": "colors:"}] * len(rewards))["advantages"]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_sum_of_rewards_is_normalised(make, options, scale):
    """Deviations are of a sample (divided by n - 1) plus 1e-4."""
    rewards = random(4, 8, 2)
    trainer = make(grpo.algorithm(options(GRPOOptions, scale_rewards=scale)), weights=(1.0, 0.5))
    groups = (rewards[:, 0] + 0.5 * rewards[:, 1]).view(2, 4)
    deviation = {"group": groups.std(1, keepdim=True), "batch": groups.std(), "none": torch.tensor(1 - 1e-4)}[scale]
    expected = (groups - groups.mean(1, keepdim=True)) / (deviation + 1e-4)
    torch.testing.assert_close(
        advantages_of(trainer, rewards), expected.flatten(), atol=1e-6, rtol=0
    )  # weights are float32


def test_normalised_rewards_are_summed(make, options):
    rewards = random(4, 8, 2)
    settings = options(GRPOOptions, reward_normalisation="normalize_then_sum")
    trainer = make(grpo.algorithm(settings), weights=(1.0, 0.5))
    groups = rewards.view(2, 4, 2)
    each = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    total = (each[..., 0] + 0.5 * each[..., 1]).flatten()
    expected = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(advantages_of(trainer, rewards), expected, atol=1e-6, rtol=0)  # weights are float32


def test_the_baseline_of_rloo_is_the_mean_of_the_others(make, options):
    rewards = random(5, 8, 1)
    found = advantages_of(make(rloo.algorithm(options(RLOOOptions))), rewards)
    groups = rewards.view(2, 4).tolist()
    expected = [
        group[i] - sum(value for j, value in enumerate(group) if j != i) / 3 for group in groups for i in range(4)
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_kl_of_rloo_is_in_the_reward(make, options):
    """The sum of log(policy / source) over a reply's tokens, k1 (arXiv:2402.14740, section 2); log-probabilities are a table."""
    trainer = make(rloo.algorithm(options(RLOOOptions)), beta=0.3)
    trainer._limit = math.inf  # the sampler's are none of the table
    rewards, tables = random(5, 8, 1), {}

    def log_probs(model, ids, mask, columns, *unused, **named):
        table = tables.setdefault(model is trainer.ref_model, random(6 + len(tables), len(ids), columns) / 4 - 2)
        return table, torch.zeros_like(table), None

    trainer._get_per_token_logps_and_entropies = log_probs
    trainer._calculate_rewards = lambda *unused: rewards
    trainer._step = 0
    output = trainer._generate_and_score_completions([{"prompt": "colors:"}] * 8)
    policy, reference = tables[False].tolist(), tables[True].tolist()
    lengths = output["completion_mask"].sum(1).tolist()
    penalties = [sum(p[t] - q[t] for t in range(n)) for p, q, n in zip(policy, reference, lengths, strict=True)]
    assert min(map(abs, penalties)) > 1e-3
    learned = [reward - 0.3 * kl for reward, kl in zip(rewards.flatten().tolist(), penalties, strict=True)]
    others = [learned[row // 4 * 4 : row // 4 * 4 + 4] for row in range(8)]
    expected = [own - (sum(group) - own) / 3 for own, group in zip(learned, others, strict=True)]
    assert output["advantages"].tolist() == pytest.approx(expected, abs=1e-9)
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(sum(penalties) / sum(lengths), abs=1e-9)  # nats a token
