"""Vocab-parallel cross entropy that ignores vocabulary padding."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup, ReduceOp


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, group: ProcessGroup
    ) -> torch.Tensor:
        width = logits.shape[-1]
        first = width * group.rank()
        valid = min(max(vocab_size - first, 0), width)  # unpadded columns of this rank
        local = labels - first
        owned = (local >= 0) & (local < valid)
        index = local.where(owned, 0)

        log_probs = torch.log_softmax(logits[..., :valid], dim=-1, dtype=torch.float32)
        if group.size() == 1:
            target = log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1)
            loss = -target.where(owned, 0.0)
        else:
            # log_probs are normalised over this rank's columns; renormalise over all ranks.
            if valid:
                lse = logits[..., 0].float() - log_probs[..., 0]
                target = log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1) + lse
                target = target.where(owned, 0.0)
            else:
                lse = torch.full(labels.shape, -torch.inf, device=logits.device)
                target = torch.zeros_like(lse)
            highest = lse.clone()
            torch.distributed.all_reduce(highest, ReduceOp.MAX, group=group)
            sums = torch.stack(((lse - highest).exp(), target))
            torch.distributed.all_reduce(sums, ReduceOp.SUM, group=group)
            normaliser = highest + sums[0].log()
            loss = (normaliser - sums[1]).where(labels >= 0, 0.0)
            if valid:
                log_probs -= (normaliser - lse).unsqueeze(-1)
        ctx.save_for_backward(log_probs, labels, index, owned)
        ctx.shape, ctx.dtype, ctx.valid = logits.shape, logits.dtype, valid
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        log_probs, labels, index, owned = ctx.saved_tensors
        grad_loss = grad_loss.where(labels >= 0, 0.0).unsqueeze(-1)
        grad = torch.empty(ctx.shape, dtype=torch.float32, device=log_probs.device)
        grad[..., ctx.valid :] = 0.0
        if ctx.valid:
            columns = grad[..., : ctx.valid]
            torch.exp(log_probs, out=columns)
            columns.mul_(grad_loss)
            columns.scatter_add_(-1, index.unsqueeze(-1), -grad_loss.where(owned.unsqueeze(-1), 0.0))
        return grad.to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, group: ProcessGroup
) -> torch.Tensor:
    """Negative log likelihood of every label, in nats, computed in fp32.

    Args:
        logits: `[..., padded_vocab / tensor_parallel]`, this rank's columns. Ids >= `vocab_size` are padding: no effect
            on the loss, gradient exactly zero.
        labels: `[...]` global ids; negative: loss 0, no gradient.
        vocab_size: without padding.
        group: tensor-parallel group, ranks in order of their columns.

    Returns:
        `[...]` fp32, equal on every rank of the group.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, vocab_size, group)
