"""Log-likelihoods of windows of text by a parallel Megatron-Core model, without gradients and optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from shared.data.labels import IGNORE
from shared.data.text_windows import Window
from shared.model.context_parallel import local_part
from shared.model.gpt import LanguageModel
from shared.runtime import progress


@torch.no_grad()
def window_likelihoods(
    chunks: Sequence[LanguageModel], windows: Sequence[Window], *, length: int, micro_batch_size: int
) -> list[float]:
    """The log-likelihood of each window's targets, in nats, on every rank.

    Data-parallel ranks share the windows; each sum over tokens is in float64.

    Args:
        chunks: this rank's model chunks, with weights.
        windows: in any order, equal on every rank.
        length: tokens that every window is padded to, on its right, where causal attention does not see them.
        micro_batch_size: windows of a forward pass.
    """
    device = next(chunks[0].parameters()).device
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    number = -(-len(windows) // (micro_batch_size * ranks))
    if len(chunks) > 1:  # the interleaved schedule's rule
        pipeline = parallel_state.get_pipeline_model_parallel_world_size()
        number = -(-number // pipeline) * pipeline
    total = torch.zeros(len(windows), dtype=torch.float64, device=device)

    def micro_batches() -> Iterator[tuple[range, torch.Tensor, torch.Tensor]]:
        for index in range(number):
            first = (index * ranks + rank) * micro_batch_size
            own = range(min(first, len(windows)), min(first + micro_batch_size, len(windows)))
            tokens = torch.zeros(micro_batch_size, length, dtype=torch.int64)
            labels = torch.full_like(tokens, IGNORE)
            for row, window in enumerate(windows[place] for place in own):
                inputs, targets = window.inputs, window.targets
                tokens[row, : len(inputs)] = torch.tensor(inputs)
                labels[row, len(inputs) - len(targets) : len(inputs)] = torch.tensor(targets)
            yield own, tokens.to(device), labels.to(device)

    def forward(batches: Iterator[Any], chunk: LanguageModel) -> tuple[torch.Tensor, Any]:
        progress.beat()
        own, tokens, labels = next(batches)
        positions = torch.arange(length, device=device).expand(tokens.shape)
        output = chunk(
            input_ids=local_part(tokens),
            position_ids=local_part(positions),
            attention_mask=None,
            labels=local_part(labels),
        )

        def collect(losses: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            by_row = (losses[0] if losses.dim() > 2 else losses).double().sum(1)  # of the next token, not of MTP
            total[own.start : own.stop] -= by_row[: len(own)]
            return losses

        return output, collect

    for chunk in chunks:
        chunk.eval()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[micro_batches() for _ in chunks] if len(chunks) > 1 else micro_batches(),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=number,
        seq_length=length,
        micro_batch_size=micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.broadcast(
        total,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return [float(value) for value in total]
