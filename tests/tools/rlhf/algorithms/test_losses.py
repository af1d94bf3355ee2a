"""PPO's formulas against float64 loops over tokens, written from the papers."""

import math

import numpy as np
import pytest
import torch

from tools.rlhf.algorithms import losses

TOLERANCE = 1e-12  # both sides compute in float64; only the order of additions differs


@pytest.fixture
def batch():
    """B = 3 replies of 6, 1 and 4 tokens in T = 6 columns, with garbage outside the mask."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1.0] * 6, [1.0] + [0.0] * 5, [1.0] * 4 + [0.0] * 2], dtype=torch.float64)
    names = ("log_probs", "old_log_probs", "rewards", "values", "old_values", "advantages", "returns")
    return {name: torch.randn(3, 6, generator=generator, dtype=torch.float64) for name in names} | {"mask": mask}


def lengths(mask):
    return [int(row.sum()) for row in mask]


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (0.97, 1.0)])
def test_advantages_are_the_double_sum_of_the_paper(batch, discount, gae_lambda):
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, equation 16 of arXiv:1506.02438."""
    advantages, returns = losses.generalized_advantages(
        batch["rewards"], batch["values"], batch["mask"], discount, gae_lambda
    )
    for row, length in enumerate(lengths(batch["mask"])):
        r, v = batch["rewards"][row].tolist(), [*batch["values"][row, :length].tolist(), 0.0]
        for t in range(length):
            expected = sum(
                (discount * gae_lambda) ** (k - t) * (r[k] + discount * v[k + 1] - v[k]) for k in range(t, length)
            )
            assert advantages[row, t].item() == pytest.approx(expected, abs=TOLERANCE)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=TOLERANCE)
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()


def test_returns_at_lambda_one_are_discounted_rewards(batch):
    """With lambda 1 the critic cancels out of the targets, equation 18."""
    _, returns = losses.generalized_advantages(batch["rewards"], batch["values"], batch["mask"], 0.9, 1.0)
    for row, length in enumerate(lengths(batch["mask"])):
        for t in range(length):
            expected = sum(0.9 ** (k - t) * batch["rewards"][row, k].item() for k in range(t, length))
            assert returns[row, t].item() == pytest.approx(expected, abs=TOLERANCE)


def test_policy_loss_is_the_clipped_surrogate(batch):
    """L = -E[min(r A, clip(r, 1-eps, 1+eps) A)], equation 7 of arXiv:1707.06347."""
    total, clipped_tokens, epsilon = 0.0, 0, 0.2
    for row, length in enumerate(lengths(batch["mask"])):
        for t in range(length):
            ratio = math.exp(batch["log_probs"][row, t] - batch["old_log_probs"][row, t])
            a = batch["advantages"][row, t].item()
            clipped = min(max(ratio, 1 - epsilon), 1 + epsilon) * a
            total -= min(ratio * a, clipped)
            clipped_tokens += clipped < ratio * a
    loss, clipped = losses.policy_loss(
        batch["log_probs"], batch["old_log_probs"], batch["advantages"], batch["mask"], epsilon, 11.0
    )
    assert loss.item() == pytest.approx(total / 11, abs=TOLERANCE)
    assert int(clipped) == clipped_tokens > 0


def test_first_policy_gradient_is_minus_the_advantage(batch):
    log_probs = batch["log_probs"].clone().requires_grad_()
    loss, clipped = losses.policy_loss(log_probs, batch["log_probs"], batch["advantages"], batch["mask"], 0.2, 1.0)
    loss.backward()
    assert torch.allclose(log_probs.grad, -batch["advantages"] * batch["mask"], atol=TOLERANCE)
    assert int(clipped) == 0


def test_a_clipped_token_has_no_gradient():
    log_probs = torch.tensor([[0.5, -0.5, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]], dtype=torch.float64)
    ones = torch.ones(1, 4, dtype=torch.float64)
    loss, _ = losses.policy_loss(log_probs, torch.zeros_like(log_probs), advantages, ones, 0.2, 4.0)
    loss.backward()
    assert (log_probs.grad[0] != 0).tolist() == [False, False, True, True]


def test_value_loss_is_the_larger_of_plain_and_clipped(batch):
    total, epsilon = 0.0, 0.3
    for row, length in enumerate(lengths(batch["mask"])):
        for t in range(length):
            v, old, target = (batch[name][row, t].item() for name in ("values", "old_values", "returns"))
            near = old + min(max(v - old, -epsilon), epsilon)
            total += 0.5 * max((v - target) ** 2, (near - target) ** 2)
    loss, _ = losses.value_loss(batch["values"], batch["old_values"], batch["returns"], batch["mask"], epsilon, 11.0)
    assert loss.item() == pytest.approx(total / 11, abs=TOLERANCE)


@pytest.mark.parametrize("loss", [losses.policy_loss, losses.value_loss])
def test_micro_batch_losses_add_up_to_the_mini_batchs(batch, loss):
    """The parts' losses add up to the whole's, so neither micro-batching nor the number of ranks changes the gradient."""
    first, second, third, mask = batch["log_probs"], batch["old_log_probs"], batch["advantages"], batch["mask"]
    tokens = mask.sum()
    whole, _ = loss(first, second, third, mask, 0.2, tokens)
    parts = sum(loss(first[i], second[i], third[i], mask[i], 0.2, tokens)[0] for i in ([0], [1, 2]))
    assert parts.item() == pytest.approx(whole.item(), abs=TOLERANCE)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_have_the_true_mean(estimator):
    """Summed over the whole vocabulary with the policy's weights, both give KL(policy || reference) exactly."""
    generator = torch.Generator().manual_seed(1)
    policy, reference = (torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = sum(math.exp(p) * (p - q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    estimates = losses.kl_divergence(policy, reference, estimator)
    assert (policy.exp() * estimates).sum().item() == pytest.approx(exact, abs=TOLERANCE)
    assert (estimates >= 0).all() == (estimator == "k3")


def test_rewards_are_kl_penalties_and_the_score_on_the_last_token(batch):
    scores = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    rewards = losses.token_rewards(scores, batch["values"], batch["mask"], 0.1)
    for row, length in enumerate(lengths(batch["mask"])):
        expected = [-0.1 * batch["values"][row, t].item() for t in range(length)] + [0.0] * (6 - length)
        expected[length - 1] += scores[row].item()
        assert rewards[row].tolist() == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropy(temperature):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    tokens = torch.randint(7, (2, 3), generator=generator)
    log_probs = losses.token_log_probs(logits, tokens, temperature)
    entropy = losses.token_entropies(logits, temperature)
    for b in range(2):
        for t in range(3):
            weights = np.exp(logits[b, t].numpy() / temperature)
            p = weights / weights.sum()
            assert log_probs[b, t].item() == pytest.approx(math.log(p[tokens[b, t]]), abs=TOLERANCE)
            assert entropy[b, t].item() == pytest.approx(-(p * np.log(p)).sum(), abs=TOLERANCE)


def test_whitening_and_moments(batch):
    values, mask = batch["values"], batch["mask"]
    inside = values[mask.bool()].numpy()
    assert losses.masked_mean(values, mask).item() == pytest.approx(inside.mean(), abs=TOLERANCE)
    assert losses.masked_variance(values, mask).item() == pytest.approx(inside.var(), abs=TOLERANCE)
    white = losses.whiten(values, mask)
    expected = (inside - inside.mean()) / np.sqrt(inside.var() + 1e-8)
    assert np.abs(white[mask.bool()].numpy() - expected).max() < TOLERANCE
    assert not white[~mask.bool()].any()
    assert losses.masked_mean(values, torch.zeros_like(mask)).item() == 0


def test_statistics_over_ranks_are_those_of_all_tokens(batch):
    """Each rank's sums plus the other's, as an all-reduce would add them, give the whole's mean."""
    values, mask = batch["values"], batch["mask"]
    other = torch.stack([(values[1:] * mask[1:]).sum(), mask[1:].sum()])
    mean = losses.masked_mean(values[:1], mask[:1], lambda total: total + other)
    assert mean.item() == pytest.approx(values[mask.bool()].mean().item(), abs=TOLERANCE)


def test_explained_variance(batch):
    values, returns, mask = batch["values"], batch["returns"], batch["mask"]
    v, r = values[mask.bool()].numpy(), returns[mask.bool()].numpy()
    expected = 1 - (r - v).var() / r.var()
    assert losses.explained_variance(values, returns, mask).item() == pytest.approx(expected, abs=TOLERANCE)
    assert losses.explained_variance(returns, returns, mask).item() == pytest.approx(1.0, abs=TOLERANCE)


def test_values_outside_the_mask_have_no_influence(batch):
    mask = batch["mask"]
    spoilt = {name: torch.where(mask.bool(), t, 7.0) for name, t in batch.items()}

    def everything(b):
        advantages, returns = losses.generalized_advantages(b["rewards"], b["values"], mask, 0.9, 0.9)
        policy, _ = losses.policy_loss(b["log_probs"], b["old_log_probs"], advantages, mask, 0.2, 11.0)
        value, _ = losses.value_loss(b["values"], b["old_values"], returns, mask, 0.2, 11.0)
        return [advantages, returns, policy, value, losses.whiten(b["values"], mask)]

    for clean, other in zip(everything(batch), everything(spoilt), strict=True):
        assert torch.equal(clean, other)


@pytest.mark.parametrize(("kl", "direction"), [(12.0, 1), (6.0, 0), (2.0, -1)])
def test_kl_coefficient_moves_towards_the_target(kl, direction):
    """Section 2.2 of arXiv:1909.08593: at most 20% of an error counts."""
    new = losses.adapt_kl_coefficient(0.1, kl, target=6.0, horizon=10.0)
    assert new == pytest.approx(0.1 * (1 + 0.02 * direction))


@pytest.mark.parametrize("correction", ["token_truncate", "token_mask", "sequence_mask"])
def test_importance_weights_are_their_formulas(batch, correction):
    cap, mask = 2.0, batch["mask"]
    trained, sampled = batch["log_probs"], batch["log_probs"] + 0.6 * batch["values"]
    found = losses.importance_weights(trained.clone().requires_grad_(), sampled, mask, correction, cap)
    assert not found.requires_grad
    dropped = kept = 0
    for row, length in enumerate(lengths(mask)):
        ratios = [math.exp(trained[row, t] - sampled[row, t]) for t in range(length)]
        for t, ratio in enumerate(ratios):
            if correction == "sequence_mask":
                ratio = math.prod(ratios)
            within = 1 / cap <= ratio <= cap
            expected = min(ratio, cap) if correction == "token_truncate" else ratio if within else 0.0
            dropped, kept = dropped + (not within), kept + within
            assert found[row, t].item() == pytest.approx(expected, abs=TOLERANCE)
        assert not found[row, length:].any()
    assert min(dropped, kept) > 0


def test_the_policy_loss_takes_weights_for_its_mask(batch):
    """w max(-r A, -clip(r) A), divided by the number of tokens with a weight above 0; weights scale, they do not clip."""
    weights = losses.importance_weights(
        batch["log_probs"], batch["log_probs"] + 0.6 * batch["values"], batch["mask"], "token_mask", 2.0
    )
    kept = int((weights > 0).sum())
    assert 0 < kept < batch["mask"].sum()
    loss, clipped = losses.policy_loss(
        batch["log_probs"], batch["old_log_probs"], batch["advantages"], weights, 0.2, kept
    )
    total, count = 0.0, 0
    for row, length in enumerate(lengths(batch["mask"])):
        for t in range(length):
            weight, a = weights[row, t].item(), batch["advantages"][row, t].item()
            ratio = math.exp(batch["log_probs"][row, t] - batch["old_log_probs"][row, t])
            cut = min(max(ratio, 0.8), 1.2)
            total += weight * max(-ratio * a, -cut * a)
            count += weight > 0 and -cut * a > -ratio * a
    assert loss.item() == pytest.approx(total / kept, abs=TOLERANCE)
    assert clipped.item() == count
