"""From a roll-out to what PPO learns from: log-probabilities, values, rewards, advantages.

Shapes as in `tools.rlhf.rollout.rollout`: B replies on this rank, P prompt columns, T reply columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.rlhf.algorithms import losses
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.rollout.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Token sequences as a model reads them."""

    ids: Tensor
    """[B, P + T]."""
    attention_mask: Tensor
    """[B, P + T]."""
    position_ids: Tensor
    """[B, P + T]."""
    reply_mask: Tensor
    """[B, T] float."""

    def rows(self, index: Tensor) -> Sequences:
        """The rows of `index`, without the columns in which all of them are padding."""
        mask, reply_mask = self.attention_mask[index], self.reply_mask[index]
        used = mask.any(0).nonzero()
        first, stop = int(used[0]), int(used[-1]) + 1
        columns = int(reply_mask.any(0).sum())
        return Sequences(
            ids=self.ids[index, first:stop],
            attention_mask=mask[:, first:stop],
            position_ids=self.position_ids[index, first:stop],
            reply_mask=reply_mask[:, :columns],
        )

    @property
    def reply_ids(self) -> Tensor:
        """[B, T]."""
        return self.ids[:, -self.reply_mask.shape[1] :]

    def micro_batches(self, rows: Tensor, size: int) -> Iterator[tuple[Tensor, Sequences]]:
        """The given rows in parts of `size`, with their indices; by length, so that a part holds little padding."""
        lengths = self.attention_mask[rows].sum(-1)
        for index in rows[lengths.argsort(stable=True)].split(size):
            yield index, self.rows(index)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a model."""
        return {"input_ids": self.ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids}


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Everything an update needs; all tensors but the sequences' are [B, T]."""

    sequences: Sequences
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What turns scores into advantages."""

    temperature: float
    kl_estimator: losses.KLEstimator
    kl_coefficient: float
    missing_eos_penalty: float
    discount: float
    gae_lambda: float
    whiten_advantages: bool
    micro_batch_size: int


def reply_logits(model: Any, sequences: Sequences) -> Tensor:
    """The logits [B, T, vocabulary] that the reply tokens were sampled from; those of the prompt are not computed."""
    columns = sequences.reply_mask.shape[1]
    return model(**sequences.inputs, use_cache=False, logits_to_keep=columns + 1).logits[:, :-1]


def policy_log_probs(model: Any, sequences: Sequences, temperature: float) -> Tensor:
    """Log-probabilities [B, T] of the reply tokens under a policy."""
    return losses.token_log_probs(reply_logits(model, sequences), sequences.reply_ids, temperature)


def reply_values(critic: Any, sequences: Sequences) -> Tensor:
    """The critic's values [B, T] before each reply token, float32."""
    columns = sequences.reply_mask.shape[1]
    return critic(**sequences.inputs)[:, -columns - 1 : -1].float()


@torch.no_grad()
def collect(
    rollout: Rollout,
    scores: Tensor,
    recipe: Recipe,
    *,
    actor: Any,
    critic: Any,
    reference: Any,
    distributed: DistributedContext,
) -> tuple[Experience, dict[str, float]]:
    """Evaluate a roll-out with the models as they are.

    The log-probabilities are the trainer's own, recomputed from the sampled ids, so that the first ratio of an update is 1;
    how far they are from the sampler's is among the metrics.

    Args:
        rollout: B sampled replies.
        scores: [B] rewards of whole replies.
        recipe: coefficients.
        actor: the policy's engine.
        critic: the critic's engine.
        reference: the frozen policy's engine.
        distributed: reduces statistics over the ranks.

    Returns:
        the experience, and metrics over all ranks.
    """
    sequences = Sequences(
        ids=rollout.ids,
        attention_mask=rollout.attention_mask,
        position_ids=rollout.position_ids,
        reply_mask=rollout.reply_mask,
    )
    mask = rollout.reply_mask
    log_probs, entropies, reference_log_probs, values = (torch.zeros_like(mask) for _ in range(4))
    for index, part in sequences.micro_batches(torch.arange(len(mask), device=mask.device), recipe.micro_batch_size):
        columns = part.reply_mask.shape[1]
        logits = reply_logits(actor, part)
        log_probs[index, :columns] = losses.token_log_probs(logits, part.reply_ids, recipe.temperature)
        entropies[index, :columns] = losses.token_entropies(logits, recipe.temperature)
        reference_log_probs[index, :columns] = policy_log_probs(reference, part, recipe.temperature)
        values[index, :columns] = reply_values(critic, part)

    kl = losses.kl_divergence(log_probs, reference_log_probs, recipe.kl_estimator)
    ended = torch.tensor([reply.ended for reply in rollout.replies], dtype=torch.float32, device=mask.device)
    scores = scores.to(mask.device) - recipe.missing_eos_penalty * (1 - ended)
    rewards = losses.token_rewards(scores, kl, mask, recipe.kl_coefficient)
    advantages, returns = losses.generalized_advantages(rewards, values, mask, recipe.discount, recipe.gae_lambda)
    explained = losses.explained_variance(values, returns, mask, distributed.sum)
    if recipe.whiten_advantages:
        advantages = losses.whiten(advantages, mask, distributed.sum)

    gap = (rollout.sampler_log_probs - log_probs).abs() * mask
    replies = torch.ones_like(ended)
    metrics = {
        "kl": losses.masked_mean(kl, mask, distributed.sum).item(),
        "kl_reply": losses.masked_mean((kl * mask).sum(-1), replies, distributed.sum).item(),
        "entropy": losses.masked_mean(entropies, mask, distributed.sum).item(),
        "log_prob_gap": losses.masked_mean(gap, mask, distributed.sum).item(),
        "log_prob_gap_max": distributed.maximum(gap.max().item()),
        "explained_variance": explained.item(),
        "reply_tokens": losses.masked_mean(mask.sum(-1), replies, distributed.sum).item(),
        "ended": losses.masked_mean(ended, replies, distributed.sum).item(),
    }
    experience = Experience(
        sequences=sequences, log_probs=log_probs, values=values, advantages=advantages, returns=returns
    )
    return experience, metrics
