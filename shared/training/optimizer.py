"""Megatron-Core's data parallelism and distributed optimizer, for pretrain and sft."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from shared.training import host_moments
from shared.training.config import TrainingConfig
from shared.training.optimizer_shards import param_state

_SHARDING = "fully_reshardable"  # each parameter's state in the parameter's own shape


def wrap(chunks: list[GPTModel], *, overlap: bool, bucket_size: int | None = None) -> list[DistributedDataParallel]:
    """Data-parallel wrappers of this rank's model chunks, with gradient reduction in fp32.

    With overlap, and more than one data-parallel rank, gradients are reduced in buckets during the backward pass, and weights
    are gathered in buckets during the next forward pass: between `optimizer.step` and that pass they are old. Who reads them
    in between calls `gather_weights`.

    Args:
        chunks: of this rank.
        overlap: communicate during computation.
        bucket_size: parameters per bucket; None: 40 million, or a million per data-parallel rank.
    """
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    overlap = overlap and ranks > 1
    first_stage = parallel_state.get_pipeline_model_parallel_rank() == 0
    wrapped = []
    for index, chunk in enumerate(chunks):
        config = chunk.config
        # Losses are sums over tokens (loss.py): Megatron-Core divides the gradients by the number of targets.
        assert config.calculate_per_token_loss
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            bucket_size=bucket_size or max(40_000_000, 1_000_000 * ranks),
        )
        # One bucket where Megatron-Core has one: without overlap, and where the pipeline hides the communication.
        buckets = overlap and first_stage and index == 0
        places = DistributedOptimizer.compute_full_param_layout(
            [parameter for parameter in chunk.parameters() if parameter.requires_grad],
            ddp_config.bucket_size if buckets else None,
            ranks,
            ddp_config,
            expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
        )
        wrapped.append(
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0, full_param_layout=places)
        )
        if overlap:
            _gather_before_layers(wrapped[-1])
    shared_config = chunks[0].config
    shared_config.finalize_model_grads_func = finalize_model_grads
    if overlap:  # gradients of all but the last micro batch are only added up
        shared_config.no_sync_func = wrapped[0].no_sync if len(wrapped) == 1 else [each.no_sync for each in wrapped]
    return wrapped


def gather_weights(model: list[DistributedDataParallel]) -> None:
    """Make every rank's weights those after the last update, with overlap too. Collective."""
    for chunk in model:
        groups = chunk.bucket_groups + chunk.expert_parallel_bucket_groups
        if chunk.ddp_config.overlap_param_gather and not all(map(_is_gathered, groups)):
            chunk.start_param_sync(force_sync=True)


def _is_gathered(group: Any) -> bool:
    """Whether a bucket group's weights were gathered after the last update, by a validation, say."""
    return group.param_gather_dispatched and group.param_gather_handle is None


def _gather_before_layers(model: DistributedDataParallel) -> None:
    """Wait for all weights of a layer before it runs.

    Megatron-Core waits for a module's own weights when the module is called. Modules that read the weights of others, and do
    not call them, would read old ones: grouped experts, the convolution of a gated delta net.
    """
    for layer in model.module.modules():
        if isinstance(layer, BaseTransformerLayer):
            groups = dict.fromkeys(
                model.param_to_bucket_group[each] for each in layer.parameters() if each.requires_grad
            )
            layer.register_forward_pre_hook(partial(_finish_gathering, list(groups)))


def _finish_gathering(groups: list[Any], layer: torch.nn.Module, inputs: Any) -> None:
    for group in groups:
        group.finish_param_sync()


def build_optimizer(config: TrainingConfig, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW. Its state and the fp32 main parameters are sharded over data-parallel ranks.

    Experts with their own data-parallel groups (EP > 1, or ETP != TP) have a second optimizer in `chained_optimizers`.

    Weight decay is decoupled, on matrices only: biases and norm weights have none.
    """
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.learning_rate,
            min_lr=config.min_learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=1e-8,
            bf16=config.precision == "bf16",
            params_dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=model[0].ddp_config.overlap_param_gather,
            clip_grad=config.clip_grad,
        ),
        model,
    )
    chunks_config = model[0].config
    chunks_config.grad_scale_func = optimizer.scale_loss
    for part in optimizer.chained_optimizers:
        part.get_parameter_state_dp_zero = partial(_room_for_state, part)
        part.load_state_dict = _nothing_to_load
        for group in part.param_groups:
            # Megatron-Core computes this product in its scheduler, which is not used here.
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
            if isinstance(part.optimizer, torch.optim.AdamW):
                group["fused"] = True  # one pass over memory instead of a dozen
        if config.offload_optimizer and part.get_parameters():
            host_moments.offload(part.optimizer)
    return optimizer


def _nothing_to_load(state_dict: dict[str, Any]) -> None:
    """Megatron-Core's own load of groups and counters, which its sharded state dict begins with: `restore` loads them.

    It would make room for all moments on the GPU, where `offload_optimizer` has none. And with torch's AdamW it would give all
    parameters the same `step` tensor, to which AdamW adds one for each: the bias correction of a resumed run would run ahead.
    """


def _room_for_state(part: DistributedOptimizer, *, empty_data: bool, **named: Any) -> dict[Any, Any]:
    """Zeros that the state of all parameters is loaded into.

    Megatron-Core's `get_parameter_state_dp_zero` leaves out the padding between buckets, and its caller cuts by places that count
    the padding: with several buckets the last parameters would get too little.
    """
    assert empty_data  # for a save nothing is gathered: optimizer_shards.py
    state: dict[Any, Any] = DistributedOptimizer.get_parameter_state_dp_zero(part, empty_data=True, **named)
    for index, buffer in enumerate(part.buffers):
        for tensors in state[index].values():
            for key, joined in tensors.items():
                if isinstance(joined, torch.Tensor):
                    tensors[key] = torch.zeros(buffer.numel, dtype=joined.dtype)
    return state


def held_bytes(model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> dict[str, int]:
    """Bytes of this rank's weights, gradient buffers and optimizer state (with fp32 main weights), after an update."""
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    states = on_host = 0
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:  # no parameter on this rank
            continue
        on_host += host_moments.moment_bytes(part.optimizer)
        for parameter, state in part.optimizer.state.items():
            states += sum(each.nbytes for each in state.values() if isinstance(each, torch.Tensor))
            states += parameter.nbytes if model[0].config.bf16 else 0  # fp32 weights are their own main copy
    return {
        "weights": sum(parameter.nbytes for chunk in model for parameter in chunk.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": states - on_host,
        **({"moments on the host": on_host} if on_host else {}),
    }


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def sharded_state(
    optimizer: MegatronOptimizer, weights: dict[str, Any], *, step: int, is_loading: bool, metadata: dict[str, Any]
) -> dict[Any, Any]:
    """The optimizer's sharded state dict; with several chained optimizers `{index: state dict}`.

    Like Megatron-Core's `ChainedOptimizer.sharded_state_dict`, with two differences. It allows optimizers without
    parameters on this rank: experts on a pipeline stage without MoE layers, or a frozen stage. Megatron-Core fails there:
    it reads the step from a parameter's state. And for a save every rank describes its own range of each weight.
    Megatron-Core gathers all ranges on one rank of each data-parallel group, which takes half of the time of a save.

    Args:
        optimizer: from `build_optimizer`.
        weights: the model's sharded state dict.
        step: updates done.
        is_loading: whether the state dict is for a load.
        metadata: the checkpoint's content metadata, with `chained_optim_avoid_prefix`.
    """

    def state_of(part: DistributedOptimizer) -> dict[str, Any]:
        state: dict[str, Any]
        if part.get_parameters() and is_loading:
            state = part.sharded_state_dict(weights, is_loading, metadata=metadata)
            return state
        if part.get_parameters():
            state = part.state_dict()
            return state | {"param_state": param_state(part, weights), "param_state_sharding_type": _SHARDING}
        groups = [
            {name: value for name, value in group.items() if name != "params"} | {"step": step}
            for group in part.param_groups
        ]
        return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": _SHARDING}

    states = [state_of(part) for part in optimizer.chained_optimizers]
    return states[0] if len(states) == 1 else dict(enumerate(states))


def restore(optimizer: MegatronOptimizer, saved: dict[Any, Any]) -> None:
    """Load the optimizer's state from a checkpoint, with a separate step counter for every parameter.

    Tensors are stored per parameter: one optimizer can load the state of two chained ones, and vice versa. From the stored
    groups only the step is read; learning rate, betas and weight decay come from the configuration.
    """
    step, chained = _saved_step(saved), len(optimizer.chained_optimizers) > 1
    for index, part in enumerate(optimizer.chained_optimizers):
        if not part.get_parameters():
            continue
        for group in part.optimizer.param_groups:
            if "step" in group:  # TransformerEngine's FusedAdam
                group["step"] = int(step)
        states = list(part.optimizer.state.values())
        counters = [
            each.pop("step", None) for each in states
        ]  # torch's AdamW; upstream would look for them in the file
        part.load_parameter_state_from_fully_reshardable((saved[index] if chained else saved)["param_state"])
        for each, counter in zip(states, counters, strict=True):
            if counter is not None:
                each["step"] = counter.fill_(step)


def _saved_step(saved: dict[Any, Any]) -> Any:
    """Updates done, from the parameter groups of the first optimizer."""
    first = saved if "optimizer" in saved else saved[0]
    assert first["param_state_sharding_type"] == _SHARDING
    return first["optimizer"]["param_groups"][0]["step"]


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Allocate Adam's state, as the tensors a checkpoint is loaded into. The values are dummies."""
    for part in optimizer.chained_optimizers:
        if part.get_parameters() and not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()
