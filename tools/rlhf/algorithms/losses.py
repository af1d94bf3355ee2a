"""PPO's formulas as pure functions of tensors: no model, no process group, no I/O.

Shapes: B replies, T positions of the longest reply. `mask` [B, T] is 1 on reply tokens through EOS, else 0. Index t is the
action that emits reply token t: log-probability and advantage are of this action, the value is of the state before it.

Papers: PPO arXiv:1707.06347, GAE arXiv:1506.02438, per-token KL penalty (InstructGPT) arXiv:2203.02155, adaptive KL
coefficient arXiv:1909.08593, entropy bonus: PPO's equation 9.
Weights of sampled tokens: Ionides, "Truncated importance sampling" (2008), as V-trace's
arXiv:1802.01561; a mask of tokens with both bounds, IcePop, arXiv:2510.18855. k1 and k3 are John Schulman's estimators of
KL(policy || reference).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k3"]
Correction = Literal["token_truncate", "token_mask", "sequence_mask"]
Reduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over the data-parallel ranks; the identity on one process."""


def one_process(total: Tensor) -> Tensor:
    """The `Reduce` of a single process."""
    return total


def masked_mean(values: Tensor, mask: Tensor, reduce: Reduce = one_process) -> Tensor:
    """Mean of `values` [B, T] where `mask` is 1, over the tokens of all ranks: a scalar, 0 without tokens."""
    total = reduce(torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)]))
    return total[0] / total[1].clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor, reduce: Reduce = one_process) -> Tensor:
    """Population variance (divided by n) of `values` [B, T] where `mask` is 1, in two passes: a scalar."""
    mean = masked_mean(values, mask, reduce)
    return masked_mean((values - mean) ** 2, mask, reduce)


def whiten(values: Tensor, mask: Tensor, reduce: Reduce = one_process) -> Tensor:
    """`values` [B, T] shifted and scaled to mean 0 and variance 1 over the masked tokens of all ranks; 0 elsewhere."""
    mean = masked_mean(values, mask, reduce)
    variance = masked_variance(values, mask, reduce)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [B, T] of tokens [B, T] under softmax(logits / temperature), logits [B, T, vocabulary].

    `temperature` is the sampling temperature: the trained distribution is the sampled one. Computed in float32 or float64.
    """
    logits = _scaled(logits, temperature)
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def token_entropies(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropies [B, T] in nats of softmax(logits / temperature), logits [B, T, vocabulary]."""
    log_probs = torch.log_softmax(_scaled(logits, temperature), dim=-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature


def kl_divergence(log_probs: Tensor, reference_log_probs: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate [B, T] of KL(policy || reference) in nats from tokens sampled by the policy.

    With r = reference / policy: k1 = -log r (unbiased, may be negative), k3 = r - 1 - log r (unbiased, never negative).
    """
    log_ratio = reference_log_probs - log_probs
    if estimator == "k1":
        return -log_ratio
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Rewards [B, T]: -kl_coefficient * kl per token, plus the score [B] on the last token."""
    rewards = -kl_coefficient * kl * mask
    last = mask.sum(-1).long() - 1
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation and the value targets.

    delta_t = r_t + discount * V_{t+1} - V_t;  A_t = delta_t + discount * gae_lambda * A_{t+1};  R_t = A_t + V_t.
    V and A after the last token are 0: the episode ends there, also without EOS.

    Args:
        rewards: [B, T].
        values: [B, T].
        mask: [B, T].
        discount: gamma, in [0, 1].
        gae_lambda: lambda, in [0, 1].

    Returns:
        advantages [B, T] and returns [B, T], both 0 outside the mask.
    """
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(values)
    following_value = torch.zeros_like(values[:, 0])
    following_advantage = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * following_value - values[:, t]
        following_advantage = (delta + discount * gae_lambda * following_advantage) * mask[:, t]
        following_value = values[:, t]
        advantages[:, t] = following_advantage
    return advantages, (advantages + values) * mask


def importance_weights(
    log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor, correction: Correction, cap: float
) -> Tensor:
    """Weights [B, T] that make means over the sampler's tokens means over the trainer's; 0 outside the mask, no gradient.

    With the ratio r = exp(log_probs - sampler_log_probs) of a token, and R the product of a reply's:

    token_truncate  min(r, cap)
    token_mask      r if 1 / cap <= r <= cap, else 0
    sequence_mask   R, for every token of the reply, if 1 / cap <= R <= cap, else 0

    A token of weight 0 is not learned from: it leaves the number of tokens that a loss is divided by, too.

    Args:
        log_probs: [B, T], the trainer's of the weights that sampled.
        sampler_log_probs: [B, T], the sampler's.
        mask: [B, T].
        correction: which of the weights.
        cap: above 1.
    """
    difference = ((log_probs - sampler_log_probs) * mask).detach()
    if correction == "sequence_mask":
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    if correction == "token_truncate":
        return ratio.clamp(max=cap) * mask
    return torch.where((ratio >= 1 / cap) & (ratio <= cap), ratio, 0.0) * mask


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    tokens: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate loss, summed over the masked tokens and divided by `tokens`.

    `mask` may hold the weights of `importance_weights`. A token is counted as clipped whatever its weight, if that is not 0.

    `tokens` is the number of masked tokens in the mini-batch, over all micro-batches and ranks. The sum over micro-batches
    and ranks is the mini-batch's mean per token: invariant to micro-batch size and number of ranks.

    Returns:
        the loss (scalar) and the number of tokens with a clipped ratio (scalar, no gradient).
    """
    ratio = torch.exp(log_probs - old_log_probs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = (torch.maximum(unclipped, clipped) * mask).sum() / tokens
    return loss, ((clipped > unclipped) * (mask > 0)).sum().detach()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float, tokens: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The critic's clipped squared error, halved; reduction and return values as in `policy_loss`."""
    clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    unclipped, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    loss = 0.5 * (torch.maximum(unclipped, clipped) * mask).sum() / tokens
    return loss, ((clipped > unclipped) * mask).sum().detach()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = one_process) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over masked tokens, a scalar: 1 for a perfect critic, 0 for a constant one."""
    return 1 - masked_variance(returns - values, mask, reduce) / masked_variance(returns, mask, reduce).clamp(min=1e-12)


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, horizon: float) -> float:
    """The proportional controller of arXiv:1909.08593 section 2.2.

    Args:
        coefficient: current KL coefficient.
        kl: observed KL, nats per reply.
        target: target KL, nats per reply.
        horizon: number of iterations in which an error of 100% changes the coefficient by a factor of e.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error / horizon)


def entropy_bonus(entropies: Tensor, mask: Tensor, tokens: Tensor | float) -> Tensor:
    """Entropies [B, T] of the policy, summed over the masked tokens and divided by `tokens`, as in `policy_loss`: a scalar."""
    return (entropies * mask).sum() / tokens


def update_kl(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, tokens: Tensor | float) -> Tensor:
    """Estimate k3 of KL(sampling policy || policy), nats a token, reduced as in `policy_loss`: a scalar, no gradient."""
    kl = kl_divergence(old_log_probs, log_probs.detach(), "k3")
    return (kl * mask).sum() / tokens
