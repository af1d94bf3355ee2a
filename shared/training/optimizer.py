"""Megatron-Core's data parallelism and distributed optimizer, as both training stages use them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from shared.training.config import TrainingConfig


def wrap(chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """Data-parallel wrappers of this rank's model chunks, with gradients summed in fp32."""
    wrapped = []
    for index, chunk in enumerate(chunks):
        config = chunk.config
        # Losses are sums over tokens (loss.py), so Megatron-Core has to divide the gradients by their number.
        assert config.calculate_per_token_loss
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
        )
        places = DistributedOptimizer.compute_full_param_layout(
            [parameter for parameter in chunk.parameters() if parameter.requires_grad],
            None,  # one bucket: nothing is reduced before the last gradient is there
            parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            ddp_config,
        )
        wrapped.append(
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0, full_param_layout=places)
        )
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(config: TrainingConfig, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW, its state and the fp32 main parameters cut over data-parallel ranks.

    Weight decay is decoupled and acts on matrices only: biases and norm weights are vectors and are left alone.
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
            clip_grad=config.clip_grad,
        ),
        model,
    )
    chunks_config = model[0].config
    chunks_config.grad_scale_func = optimizer.scale_loss
    for group in optimizer.param_groups:
        # Megatron-Core leaves this product to its own scheduler, which is not used here.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        if isinstance(_inner(optimizer), torch.optim.AdamW):
            group["fused"] = True  # one pass over memory instead of a dozen
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def restore(optimizer: MegatronOptimizer, saved: dict[str, Any]) -> None:
    """Load the optimizer's part of a checkpoint, with a step counter of its own for every parameter.

    With torch's AdamW (no Transformer Engine or Apex) Megatron-Core's own load goes wrong twice. It looks for a `step`
    among the saved tensors of each parameter, where there is none: the step is saved once, with the groups. And it
    gives all parameters one and the same `step` tensor, to which AdamW adds one per *parameter*, so that the bias
    correction of a resumed run would jump ahead at every update. So groups and tensors are loaded one after the
    other, and the counter is set aside between.
    """
    inner = _distributed(optimizer)
    saved = dict(saved)
    tensors = saved.pop("param_state")
    assert saved.pop("param_state_sharding_type") == "fully_reshardable"
    inner.load_state_dict(saved)
    states = list(inner.optimizer.state.values())
    steps = [state.pop("step", None) for state in states]  # FusedAdam counts in its groups
    inner.load_parameter_state_from_fully_reshardable(tensors)
    for state, step in zip(states, steps, strict=True):
        if step is not None:
            state["step"] = step.clone()


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Make Adam's state exist, so that a checkpoint has tensors to load into; its values are then overwritten."""
    inner = _distributed(optimizer)
    if not inner.optimizer.state:
        inner._init_optimizer_states_with_dummy_values()


def _distributed(optimizer: MegatronOptimizer) -> DistributedOptimizer:
    (only,) = optimizer.chained_optimizers  # one for dense models
    return only


def _inner(optimizer: MegatronOptimizer) -> torch.optim.Optimizer:
    return _distributed(optimizer).optimizer
