"""Logits of a parallel model, gathered on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from shared.model.gpt import LanguageModel


@torch.no_grad()
def logits(chunks: Sequence[LanguageModel], ids: torch.Tensor) -> torch.Tensor:
    """Next-token logits of every position.

    Args:
        chunks: this rank's model chunks, from `shared.model.gpt.build`.
        ids: `[batch, sequence]`, equal on every rank; with sequence parallelism, tensor_parallel divides `sequence`.

    Returns:
        `[batch, sequence, vocab_size]` fp32 without vocabulary padding, equal on every rank.
    """
    architecture = chunks[0].architecture
    rows = list(ids.to(next(chunks[0].parameters()).device).split(1))
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    if len(chunks) > 1:  # interleaved schedule: micro batches must be a multiple of PP, so repeat the last row
        rows += rows[-1:] * (-len(rows) % pipeline)
    positions = torch.arange(ids.shape[1], device=rows[0].device)[None]

    def forward(iterator: Iterator[torch.Tensor], chunk: LanguageModel) -> tuple[torch.Tensor, Any]:
        return chunk(next(iterator), positions, None), collect

    def collect(output: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        whole = gather_from_tensor_model_parallel_region(output)
        return whole[..., : architecture.vocab_size].float()

    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    collected = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(rows) for _ in chunks] if len(chunks) > 1 else iter(rows),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(rows),
        seq_length=ids.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    for chunk, was_training in zip(chunks, training, strict=True):
        chunk.train(was_training)

    shape = (ids.shape[0], ids.shape[1], architecture.vocab_size)
    blank = torch.empty(shape, dtype=torch.float32, device=rows[0].device)  # receive buffer of the broadcast
    result = torch.cat(collected)[: ids.shape[0]] if collected else blank
    torch.distributed.broadcast(
        result,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return result
