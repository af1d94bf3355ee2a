"""The loss and its normalisation.

    loss = sum of negative log-likelihoods / number of targets, both over the *global* batch

So it is invariant to data-parallel size, micro batch size and packing. Each micro batch returns its sum and its count.
Megatron-Core (`calculate_per_token_loss`) adds both over micro batches and ranks, and divides the gradients once.

The MTP loss is DeepSeek V3's (arXiv:2412.19437, equations 24 and 25):

    MTP loss = weight x mean over MTP layers of the sum of negative log-likelihoods / number of *next-token* targets

It has the same invariance. The load-balancing loss of MoE is no sum over targets: its gradient is

    coefficient x mean over micro batches of the loss of a micro batch, which is over all its tokens but padding

whatever the number of targets (`balancing_scale`).

For the MTP loss, Megatron-Core's `process_mtp_loss` divides by the MTP targets of each micro batch instead. The
difference is small (each segment has fewer MTP targets), but depends on the micro batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from shared.data.labels import IGNORE

Report = dict[str, torch.Tensor]


def mtp_labels(labels: torch.Tensor, segments: torch.Tensor | None, depth: int) -> torch.Tensor:
    """Labels of the next token and of each MTP layer.

    Args:
        labels: `[batch, sequence]`, the next token, or IGNORE (no loss).
        segments: `[batch, sequence]`; None: one segment per row.
        depth: number of MTP layers. Layer k, from 1, has the label of k positions later.

    Returns:
        `[1 + depth, batch, sequence]`, IGNORE for labels beyond the end of the row or the segment.
    """
    every = [labels]
    for offset in range(1, depth + 1):
        shifted = torch.full_like(labels, IGNORE)
        shifted[:, :-offset] = labels[:, offset:]
        if segments is not None:
            shifted[:, :-offset][segments[:, offset:] != segments[:, :-offset]] = IGNORE
        every.append(shifted)
    return torch.stack(every)


def token_loss(
    losses: torch.Tensor, labels: torch.Tensor, mtp_loss_scaling_factor: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, Report]:
    """Loss sum of a micro batch, in the form of Megatron-Core's `loss_func`.

    Args:
        losses: negative log-likelihoods in nats, fp32 `[batch, sequence]`, 0 for label IGNORE; with an MTP loss
            `[1 + MTP layers, batch, sequence]`.
        labels: of the same shape.
        mtp_loss_scaling_factor: weight of the MTP loss.

    Returns:
        The sum, the number of next-token targets (int), and for `global_loss` the sums and counts of next-token and
        MTP losses.
    """
    losses, labels = (x.view(-1, *x.shape[-2:]) for x in (losses, labels))
    sums, counts = losses.sum((1, 2)), (labels != IGNORE).sum((1, 2))
    depth = len(sums) - 1
    total = sums[0] + mtp_loss_scaling_factor * sums[1:].mean() if depth else sums[0]
    both = [sums[0], counts[0], sums[1:].sum(), counts[1:].sum()]
    return total, counts[0].int(), {"loss": torch.stack([each.detach().double() for each in both])}


def balancing_scale(labels: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Scale of the gradients of MoE's load-balancing loss: targets / tokens of the global batch, fp32 `[1]`.

    Megatron-Core multiplies the loss by the tokens of the micro batch, in order that the division of all gradients leaves a
    mean. The division is by the number of targets: where few tokens are targets, the loss would count tokens / targets times.

    Args:
        labels: of this rank's micro batches, `[batch, sequence]` each.
        device: of the result.
    """
    targets, tokens = sum(int((each != IGNORE).sum()) for each in labels), sum(each.numel() for each in labels)
    # Not made on the device: that would wait for the update before.
    counts = torch.tensor([targets, tokens], dtype=torch.float64).to(device, non_blocking=True)
    torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    return (counts[:1] / counts[1:]).float()


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Loss over a global batch, in nats per target token."""

    mean: float
    targets: int
    mtp: float | None  # mean over MTP targets; None without any


def global_loss(reports: list[Report], device: torch.device) -> Loss:
    """The loss over all micro batches and ranks, on every rank.

    Only ranks of the last pipeline stage have reports; the others receive the result.
    """
    # fp64: the order of addition of millions of fp32 losses changes no printed digit.
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for report in reports:
        total += report["loss"]
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            total,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    loss, count, mtp_loss, mtp_count = total.tolist()
    return Loss(mean=loss / max(count, 1.0), targets=int(count), mtp=mtp_loss / mtp_count if mtp_count else None)
