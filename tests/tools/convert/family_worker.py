"""One of two ranks that run and train every family's model, at TP=2, then at PP=2.

Run as `family_worker.py WORK RANK PORT`: for each WORK/<size>.megatron, the logits of WORK/<size>.ids.pt, and one
training step on it with Megatron-Core's data-parallel wrapper and pipeline schedule. The gradients are saved
as a checkpoint, WORK/<size>.<layout>.gradients, under the keys of their weights.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shared.runtime.device

shared.runtime.device.select_device()  # CUDA, or its surface on the CPU, before Megatron-Core is imported

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # noqa: E402

from shared.architecture.architecture import Architecture  # noqa: E402
from shared.checkpoint.directory.auxiliary_files import read_config  # noqa: E402
from shared.families import registry  # noqa: E402
from shared.model import gpt, weights  # noqa: E402
from shared.model.logits import logits  # noqa: E402
from shared.model.prefix_lm import with_blank  # noqa: E402
from shared.parallel import ParallelConfig  # noqa: E402
from shared.runtime.process_groups import initialize  # noqa: E402
from shared.training.loss import mtp_labels, token_loss  # noqa: E402

LAYOUTS = {
    "tp2": ParallelConfig(processes=2, tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(processes=2, pipeline=2),
    "ep2": ParallelConfig(processes=2, expert=2),  # of models that have experts
}
SCALE = 0.3  # of the loss of tokens further ahead
ROWS, LENGTH = 2, 128  # of the training step; its labels are the next tokens


def rows_of(ids: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """`[1, positions]` to `[ROWS, LENGTH + 1]`, which overlap."""
    return with_blank(ids[0].unfold(0, LENGTH + 1, ids.shape[1] - LENGTH - 1)[:ROWS], architecture)


def layouts_of(architecture: Architecture) -> list[str]:
    """Those that a model is run at."""
    return [name for name, layout in LAYOUTS.items() if layout.expert == 1 or architecture.moe]


def step(chunk: Any, rows: torch.Tensor) -> float:
    """Mean loss of the rows; leaves the gradients of its mean in `main_grad`."""
    rows = rows[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    config, depth = chunk.config, chunk.architecture.mtp_depth
    config.finalize_model_grads_func = finalize_model_grads
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), chunk)
    model.zero_grad_buffer()
    positions = torch.arange(LENGTH)[None]

    def forward(iterator: Any, wrapped: Any) -> Any:
        row = next(iterator)
        labels = mtp_labels(row[:, 1:], None, depth) if depth else row[:, 1:]
        return wrapped(row[:, :-1], positions, None, labels=labels), partial(total, labels=labels)

    def total(losses: torch.Tensor, labels: torch.Tensor) -> Any:
        loss, count, _ = token_loss(losses, labels, SCALE)
        return loss, count, loss.detach()

    summed = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(rows.split(1)),
        model=model,
        num_microbatches=len(rows),
        seq_length=LENGTH,
        micro_batch_size=1,
    )
    loss = torch.stack(summed).sum() if summed else torch.zeros(())
    torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    torch.distributed.broadcast(
        loss,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return loss.item() / (ROWS * LENGTH)


def further_logits(chunk: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the layer for the token after the next, `[1, sequence, vocabulary]`, on every rank."""
    found = []
    if chunk.post_process:
        hook = chunk.output_layer.register_forward_hook(lambda layer, given, made: found.append(made[0]))
    labels = torch.zeros(2, *ids.shape, dtype=torch.int64)
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=lambda batches, model: (
                model(next(batches), torch.arange(ids.shape[1])[None], None, labels=labels),
                lambda losses: (losses.sum(), torch.tensor(1), losses.sum()),
            ),
            data_iterator=iter([ids]),
            model=chunk,
            num_microbatches=1,
            seq_length=ids.shape[1],
            micro_batch_size=1,
            forward_only=True,
        )
    size = chunk.architecture.padded_vocab_size(parallel_state.get_tensor_model_parallel_world_size())
    logits = torch.empty(1, ids.shape[1], size)
    if chunk.post_process:
        hook.remove()
        logits = gather_from_tensor_model_parallel_region(found[1]).transpose(0, 1).contiguous()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(logits, last, parallel_state.get_pipeline_model_parallel_group())
    return logits[..., : chunk.architecture.vocab_size]


def save_ranks(chunk: Any, layout: ParallelConfig, folder: Path) -> None:
    """A checkpoint as Megatron-LM saved it before torch_dist: every rank its own state dict, and what it goes on from."""
    a, coordinates = chunk.architecture, [f"{parallel_state.get_tensor_model_parallel_rank():02d}"]
    if layout.pipeline > 1:
        coordinates.append(f"{parallel_state.get_pipeline_model_parallel_rank():03d}")
    if layout.expert > 1:
        coordinates.append(f"{parallel_state.get_expert_model_parallel_rank():03d}")
    rank = folder / "iter_0000005" / "_".join(["mp_rank", *coordinates])
    rank.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("5")

    def known(key: str) -> bool:  # layers for tokens further ahead are refused: once is enough
        return layout.expert > 1 or not key.startswith("mtp.")

    arguments = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "expert_model_parallel_size": layout.expert,
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.attention.heads,
        "params_dtype": torch.float32,
        "model_type": ModelType.encoder_or_decoder,
    }
    state = {
        "args": argparse.Namespace(**arguments),
        "checkpoint_version": 3.0,
        "iteration": 5,
        "model": {key: value for key, value in chunk.state_dict_for_save_checkpoint().items() if known(key)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "rng_state": [
            {"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate(), "rng": torch.get_rng_state()}
        ],
    }
    torch.save(state, rank / "model_optim_rng.pt")


def main(work: Path) -> None:
    torch.set_num_threads(1)
    filesystem_async._results_queue = queue.Queue()  # no manager process that outlives this one
    filesystem_async._process_memory = lambda: 0  # asks for psutil, for a debugging line
    for name, layout in LAYOUTS.items():
        initialize(layout, 0)
        for source in sorted(work.glob("*.megatron")):
            size = source.name.removesuffix(".megatron")
            architecture = registry.from_config(read_config(source / "hf" / "config.json"))
            if name not in layouts_of(architecture):
                continue
            chunks = gpt.build(architecture, layout, dtype=torch.float32, calculate_per_token_loss=True)
            weights.load(chunks, source / "release")
            save_ranks(chunks[0], layout, work / f"{size}.{name}.ranks")
            ids = torch.load(work / f"{size}.ids.pt")
            result = {"logits": logits(chunks, ids)}
            if architecture.mtp:
                result["further"] = further_logits(chunks[0], ids)
            result["loss"] = step(chunks[0], rows_of(ids, architecture))
            gradients = work / f"{size}.{name}.gradients" / "iter_0000001"
            if torch.distributed.get_rank() == 0:
                torch.save(result, work / f"{size}.{name}.pt")
                gradients.mkdir(parents=True)
                (gradients.parent / "latest_checkpointed_iteration.txt").write_text("1")
            with torch.no_grad():
                for parameter in chunks[0].parameters():
                    parameter.copy_(parameter.main_grad)
            torch.distributed.barrier()
            dist_checkpointing.save(weights.sharded_state_dict(chunks)["model"], str(gradients))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.update(RANK=sys.argv[2], LOCAL_RANK=sys.argv[2], WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = sys.argv[3]
    main(Path(sys.argv[1]))
