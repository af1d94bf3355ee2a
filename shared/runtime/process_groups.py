"""Process groups and random generators of a parallel layout."""

from __future__ import annotations

import random

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel

from shared.errors import UserError
from shared.parallel import ParallelConfig
from shared.runtime.device import select_device
from shared.runtime.world import join_world

_layout: ParallelConfig | None = None  # of the current Megatron-Core groups


def initialize(parallel: ParallelConfig, seed: int) -> torch.device:
    """Create process groups and seed random generators for `parallel`; returns this process's device.

    The world is that of `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`; without `RANK`, a world of one process. A
    second call with another layout replaces the groups.

    Raises:
        UserError: the world size is not `parallel.processes`.
    """
    device = select_device()
    join_world()
    started = torch.distributed.get_world_size()
    if started != parallel.processes:
        raise UserError(f"--processes {parallel.processes}, but this job has {started}; give --processes {started}")
    _make_groups(parallel)
    # As in Megatron-LM: seeds differ between pipeline stages, and are equal over data-parallel ranks.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    numpy.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
    return device


def _make_groups(parallel: ParallelConfig) -> None:
    """Create Megatron-Core's groups; groups of an equal layout are kept.

    Each gloo group has a polling thread, and ends with its last reference. Megatron-Core's optimizer keeps references, and
    is never freed: its views of fp32 parameters hold gradient hooks, which refer to it.
    """
    global _layout
    if parallel_state.model_parallel_is_initialized():
        if parallel == _layout:
            return
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.etp,
    )
    _layout = parallel


def destroy() -> None:
    """Destroy all process groups after a barrier, at the end of the work.

    A process that exits with running group threads may abort. A world of one process is kept, for a later `initialize`.
    """
    if torch.distributed.get_world_size() == 1:
        return
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def data_parallel_size() -> int:
    """Data parallel size."""
    return parallel_state.get_data_parallel_world_size()
