"""From a roll-out to PPO's training data: log-probabilities, values, rewards, advantages.

Shapes: B replies on this rank, P prompt columns, T reply columns, as in `tools.rlhf.rollout.rollout`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.rlhf.algorithms import losses
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.engines.engine import Engine
from tools.rlhf.ppo_options import PPOOptions
from tools.rlhf.rollout.rollout import Rollout, Sequences
from tools.rlhf.transformers_model import accepted


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Training data of an update. Tensors are [B, T]."""

    sequences: Sequences
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    """Of each token: the KL penalty, and the score on the last one."""
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    """Of each token in the policy's loss: 1 on reply tokens, or the importance correction's; 0 elsewhere."""


def reply_logits(model: Any, sequences: Sequences) -> Tensor:
    """Logits [B, T, vocabulary] of the reply tokens; prompt logits are not computed."""
    columns = sequences.reply_mask.shape[1]
    inputs = accepted(model, {**sequences.inputs, "use_cache": False, "logits_to_keep": columns + 1})
    return model(**inputs).logits[:, -columns - 1 : -1]


def policy_log_probs(model: Any, sequences: Sequences, temperature: float) -> Tensor:
    """Log-probabilities [B, T] of the reply tokens under a policy."""
    return losses.token_log_probs(reply_logits(model, sequences), sequences.reply_ids, temperature)


def text_log_probs(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities [B, S - 1] of all tokens but the first of texts [B, S]."""
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(-1) - 1, "use_cache": False}
    return losses.token_log_probs(model(**accepted(model, inputs)).logits[:, :-1], ids[:, 1:])


def reply_values(critic: Any, sequences: Sequences) -> Tensor:
    """The critic's values [B, T], float32; value t is before reply token t."""
    columns = sequences.reply_mask.shape[1]
    return critic(**sequences.inputs)[:, -columns - 1 : -1].float()


@torch.no_grad()
def collect(
    rollout: Rollout,
    scores: Tensor,
    options: PPOOptions,
    *,
    kl_coefficient: float,
    actor: Engine,
    critic: Engine,
    reference: Any,
    distributed: DistributedContext,
) -> tuple[Experience, dict[str, float]]:
    """Compute log-probabilities, values, rewards and advantages of a roll-out.

    The trainer recomputes the log-probabilities, so the ratio of the first update is 1. Their difference from the
    sampler's is a metric.

    Args:
        rollout: B sampled replies.
        scores: [B] rewards of the replies; NaN for a reply without one, which policy and critic do not learn from.
        options: KL estimator, discount, gae_lambda, ...
        kl_coefficient: weight of the KL penalty in this iteration.
        actor: the policy.
        critic: returns values [B, P + T].
        reference: the reference policy.
        distributed: reduces statistics over the ranks.

    Returns:
        the experience, and metrics over all ranks.
    """
    sequences = rollout.sequences
    mask = sequences.reply_mask
    log_probs, entropies, reference_log_probs, values = (torch.zeros_like(mask) for _ in range(4))
    for index, part in sequences.micro_batches(torch.arange(len(mask), device=mask.device), options.micro_batch_size):
        columns = part.reply_mask.shape[1]
        logits = reply_logits(actor, part)
        log_probs[index, :columns] = losses.token_log_probs(logits, part.reply_ids, options.temperature)
        entropies[index, :columns] = losses.token_entropies(logits, options.temperature)
        reference_log_probs[index, :columns] = policy_log_probs(reference, part, options.temperature)
        values[index, :columns] = reply_values(critic, part)

    kl = losses.kl_divergence(log_probs, reference_log_probs, options.kl_estimator)
    ended = torch.tensor([reply.ended for reply in rollout.replies], dtype=torch.float32, device=mask.device)
    scores = scores.to(mask.device)
    learned = mask * (~scores.isnan()).unsqueeze(-1)
    scores = scores.nan_to_num() - options.missing_eos_penalty * (1 - ended)
    rewards = losses.token_rewards(scores, kl, mask, kl_coefficient)
    advantages, returns = losses.generalized_advantages(rewards, values, mask, options.discount, options.gae_lambda)
    returns = torch.where(learned.bool(), returns, values)
    explained = losses.explained_variance(values, returns, learned, distributed.sum)
    if options.whiten_advantages:
        advantages = losses.whiten(advantages, learned, distributed.sum)
    advantages = advantages * learned

    weights = mask
    if options.importance_correction != "none":
        weights = losses.importance_weights(
            log_probs, rollout.sampler_log_probs, mask, options.importance_correction, options.importance_cap
        )
    replies = torch.ones_like(ended)
    metrics = {
        "kl": losses.masked_mean(kl, mask, distributed.sum).item(),
        "kl_reply": losses.masked_mean((kl * mask).sum(-1), replies, distributed.sum).item(),
        "entropy": losses.masked_mean(entropies, mask, distributed.sum).item(),
        **agreement(rollout.sampler_log_probs, log_probs, mask, distributed),
        "explained_variance": explained.item(),
        "reply_tokens": losses.masked_mean(mask.sum(-1), replies, distributed.sum).item(),
        "ended": losses.masked_mean(ended, replies, distributed.sum).item(),
    }
    if weights is not mask:
        metrics |= weight_fractions(weights, mask, options.importance_cap, distributed)
    experience = Experience(
        sequences=sequences, log_probs=log_probs, values=values, rewards=rewards, advantages=advantages, returns=returns,
        weights=weights,
    )  # fmt: skip
    return experience, metrics


def agreement(
    sampler_log_probs: Tensor, log_probs: Tensor, mask: Tensor, distributed: DistributedContext
) -> dict[str, float]:
    """How far sampler and trainer agree on the reply tokens of all ranks; log-probabilities and mask are [B, T].

    log_prob_gap, log_prob_gap_max: mean and largest absolute difference, nats; sampler_kl: estimate k3 of KL(sampler || trainer);
    importance_ratio_min, importance_ratio_max: of trainer to sampler.
    """
    difference = torch.where(mask.bool(), log_probs - sampler_log_probs, 0.0)
    lowest, highest = difference.min().item(), difference.max().item()
    kl = losses.kl_divergence(sampler_log_probs * mask, log_probs * mask, "k3")
    return {
        "log_prob_gap": losses.masked_mean(difference.abs(), mask, distributed.sum).item(),
        "log_prob_gap_max": distributed.maximum(max(-lowest, highest)),
        "sampler_kl": losses.masked_mean(kl, mask, distributed.sum).item(),
        "importance_ratio_min": math.exp(-distributed.maximum(-lowest)),
        "importance_ratio_max": _exp(distributed.maximum(highest)),
    }


def weight_fractions(weights: Tensor, mask: Tensor, cap: float, distributed: DistributedContext) -> dict[str, float]:
    """What an importance correction does to the reply tokens of all ranks; weights and mask are [B, T].

    importance_weight: the mean weight; importance_dropped: share of tokens of weight 0; importance_capped: of those at the cap.
    """
    parts = {"weight": weights, "dropped": (weights == 0).float(), "capped": (weights >= cap).float()}
    return {
        f"importance_{name}": losses.masked_mean(part, mask, distributed.sum).item() for name, part in parts.items()
    }


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # a double overflows above
