"""The loss and its normalisation.

The loss of an update is the sum of the negative log-likelihoods of all target tokens of the *global* batch, divided by
their number. So it does not depend on the number of data-parallel ranks, on the micro batch size, or on how samples are
packed into rows. Each micro batch hands Megatron-Core its sum and its count; Megatron-Core (with
`calculate_per_token_loss`) adds both over micro batches and ranks and divides the gradients once.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from shared.training.data import IGNORE

Report = dict[str, torch.Tensor]


def token_loss(losses: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Report]:
    """Sum over targets, in the form the schedules of Megatron-Core ask for.

    Args:
        losses: negative log-likelihood of each label in nats, fp32 `[batch, sequence]`, 0 where there is no target.
        labels: `[batch, sequence]`, IGNORE where a position is no target.

    Returns:
        The sum, the number of targets (int), and both again as data for `global_loss`.
    """
    total = losses.sum()
    count = (labels != IGNORE).sum().int()
    return total, count, {"loss": torch.stack([total.detach().double(), count.double()])}


def global_loss(reports: list[Report], device: torch.device) -> tuple[float, int]:
    """Mean loss in nats per target token over all micro batches and ranks, and the number of targets, on every rank.

    Only ranks of the last pipeline stage have reports; the others receive the result.
    """
    # fp64: a sum of millions of fp32 losses keeps more digits than are printed, whatever the order of addition.
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for report in reports:
        total += report["loss"]
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            total,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    loss, count = total.tolist()
    return loss / max(count, 1.0), int(count)
