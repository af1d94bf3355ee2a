"""Save and load of a run's state: weights, optimizer, random states and the step.

One torch_dist directory, written by every rank. The optimizer is stored per parameter, in the parameter's own shape
(`fully_reshardable`): a run can resume at another layout. Learning rate and data order are functions of the step: only the
step is stored.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from shared.console import log, quantity
from shared.errors import StageError
from shared.kernels.fp8.recipes import Fp8Recipe
from shared.model import lora
from shared.model.gpt import uneven_layers
from shared.training.fp8_update import restore_states, sharded_states
from shared.training.optimizer import allocate_state, gather_weights, restore, sharded_state
from shared.training.optimizer_shards import without_copy
from shared.training.trainable import partly_frozen

_FULL = 1 << 20  # bytes: a disk with less is full

# Megatron-Core's content metadata of a checkpoint: conventions of its names and shards.
CONTENT = {
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "fully_reshardable",
}


def save(directory: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer, *, step: int) -> None:
    """Write the state after update `step` to an empty directory. Every rank calls this.

    Raises:
        StageError: a rank could not write.
    """
    request = describe(directory, model, optimizer, step=step)
    with failures_named(directory, step):
        request.execute_sync()


def describe(
    directory: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer, *, step: int
) -> AsyncRequest:
    """Megatron-Core's request to save: a function that writes this rank's file, and functions that complete the checkpoint.

    Its tensors are the model's and the optimizer's memory. On a GPU `preload_fn` copies them to the host.
    """
    gather_weights(model)
    sharded: dict[str, Any] = _weights(model)
    sharded["optimizer"] = _optimizer_state(model, optimizer, step=step, is_loading=False)
    sharded |= {
        "checkpoint_version": 3.0,
        "iteration": step,
        "layout": _layout(model),
        "rng_state": _random_object(_random_state()),
    }
    apply_factories(sharded)
    for tensor in nested_values(sharded):
        if isinstance(tensor, ShardedTensor):
            tensor.data = without_copy(tensor.data)
    write_from_threads()
    return dist_checkpointing.save(
        sharded, str(directory), content_metadata=dict(CONTENT), async_sharded_save=True, async_strategy="mcore"
    )


@contextlib.contextmanager
def failures_named(directory: Path, step: int) -> Iterator[None]:
    """Context manager of the last part of a save: its failure is a StageError with the cause."""
    try:
        yield
    except CheckpointException as error:  # its causes have lost their errno
        raise StageError(_why_not_saved(directory, step, error)) from None


def _why_not_saved(directory: Path, step: int, error: CheckpointException) -> str:
    run = directory.parent
    if not directory.is_dir():
        return f"update {step} was not saved: {directory} was removed during the run"
    free = shutil.disk_usage(directory).free
    if free < _FULL:
        return f"update {step} was not saved: the disk of {run} is full; free some space and run the same command again"
    if not error.failures:
        return f"update {step} was not saved; rank 0 says why"
    rank, (failure, _) = min(error.failures.items())
    reason = str(failure).splitlines()[-1]
    return (
        f"update {step} was not saved: rank {rank}: {reason}; {quantity(free, 'bytes')} are free on the disk of {run}"
    )


def load(
    directory: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer, *, fp8: Fp8Recipe | None = None
) -> int:
    """Load optimizer and random states, and with `fp8` those of FP8 layers; returns the step. The layout may differ.

    Weights are loaded before, by `shared.model.weights.load`: it handles vocabulary padding, whose size depends on the
    layout. Every rank calls this.
    """
    common = dist_checkpointing.load_common_state_dict(str(directory))
    layout = _layout(model)
    same_layout = common["layout"] == layout
    allocate_state(optimizer)
    sharded: dict[str, Any] = {"optimizer": _optimizer_state(model, optimizer, step=0, is_loading=True)}
    if fp8:
        sharded["fp8"] = sharded_states(_weights(model), load_sharded_metadata(str(directory)))
    if same_layout:
        sharded["rng_state"] = _random_object(None)
    loaded = dist_checkpointing.load(sharded, str(directory))
    restore(optimizer, loaded["optimizer"])
    if fp8:
        restore_states(model, loaded["fp8"], fp8)
    if same_layout:
        _restore_random(loaded["rng_state"])
    else:
        log(
            f"resuming at another layout ({_describe(layout)}, was {_describe(common['layout'])}): random states start anew"
        )
    return int(common["iteration"])


def _weights(model: list[DistributedDataParallel], **metadata: Any) -> dict[str, Any]:
    """The model's sharded state dict; with LoRA the adapters', and the extra states, which have the amax histories of FP8."""
    only = lora.trained_state if lora.has_adapters([chunk.module for chunk in model]) else dict
    return {
        # Megatron-LM's names: `model`, or `model0`, `model1`... with a virtual pipeline.
        "model" if len(model) == 1 else f"model{index}": only(
            chunk.module.sharded_state_dict(metadata=CONTENT | metadata)
        )
        for index, chunk in enumerate(model)
    }


def _optimizer_state(
    model: list[DistributedDataParallel], optimizer: MegatronOptimizer, *, step: int, is_loading: bool
) -> dict[Any, Any]:
    """The optimizer's sharded state dict: tensors are named and sharded like their weights.

    All layers of a weight form one tensor. With some layers frozen it would have holes, which torch refuses to save: then
    every layer is a separate tensor.
    """
    by_layer = {"non_homogeneous_layers": True} if partly_frozen([chunk.module for chunk in model]) else {}
    weights = _weights(model, **by_layer)
    return sharded_state(optimizer, weights, step=step, is_loading=is_loading, metadata=CONTENT)


def _layout(model: list[DistributedDataParallel]) -> dict[str, Any]:
    """Parallel sizes that random states depend on. Default CP, EP, ETP and shares of layers are left out: old checkpoints lack
    them. Uneven shares say which rank draws the numbers of a layer's dropout.
    """
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    sizes_and_defaults = {
        "context": (parallel_state.get_context_parallel_world_size(), 1),
        "expert": (parallel_state.get_expert_model_parallel_world_size(), 1),
        "expert_tensor": (parallel_state.get_expert_tensor_parallel_world_size(), tensor),
    }
    layers = uneven_layers(model[0].config)
    return {
        "tensor": tensor,
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "data": parallel_state.get_data_parallel_world_size(),
        **{name: size for name, (size, default) in sizes_and_defaults.items() if size != default},
        **({"pipeline_layers": layers} if layers else {}),
    }


def _describe(layout: dict[str, Any]) -> str:
    sizes = {name: size for name, size in layout.items() if name != "pipeline_layers"}
    described = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one process"
    layers = layout.get("pipeline_layers")
    return f"{described} of {','.join(map(str, layers))} layers" if layers else described


def _random_state() -> dict[str, Any]:
    """This rank's random states: CPU, device, and Megatron-Core's RNG tracker."""
    return {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "regions": get_cuda_rng_tracker().get_states(),
    }


def _restore_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["regions"])


def _random_object(state: dict[str, Any] | None) -> ShardedObject:
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject("rng_state", state, (ranks,), (rank,), replica_id=0)


def write_from_threads() -> None:
    """Replace the result queue of Megatron-Core's writer by a thread queue; there is no option for it.

    The default queue belongs to a manager process, which would outlive a killed run. A forked writer hands its results over
    in a file of its own: see background_writer.py.
    """
    filesystem_async._results_queue = queue.Queue()
