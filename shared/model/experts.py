"""A mixture of experts, from Megatron-Core's own modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from shared.model.architecture import Architecture, Experts


def experts_of(architecture: Architecture) -> Callable[..., Any]:
    """Builds the layer's experts; without biases, as every family's that is computed here."""
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return partial(
        MoELayer,
        submodules=MoESubmodules(
            experts=partial(SequentialMLP, submodules=linear),
            shared_experts=partial(SharedExpertMLP, submodules=linear),
        ),
    )


def experts_config(architecture: Architecture, experts: Experts) -> dict[str, Any]:
    """Fields of `TransformerConfig`.

    Raises:
        ValueError: for a choice of groups of experts that Megatron-Core does not compute.
    """
    if experts.groups > 1 and experts.top_k // experts.top_groups != _SCORES_OF_A_GROUP:
        raise ValueError("groups of experts are compared by the sum of their two best scores, for which top_k is twice")
    mixed = not architecture.homogeneous
    return {
        "num_moe_experts": experts.count,
        "moe_layer_freq": [int(i in architecture.moe_layers) for i in range(architecture.num_layers)] if mixed else 1,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.top_k,
        "moe_router_score_function": experts.score,
        # Softmax before the choice leaves the scores as they are, after it divides them by their sum.
        "moe_router_pre_softmax": experts.score == "softmax" and not experts.normalized,
        "moe_router_topk_scaling_factor": experts.scaling if experts.scaling != 1.0 else None,
        "moe_router_enable_expert_bias": experts.correction_bias,
        "moe_router_num_groups": experts.groups if experts.groups > 1 else None,
        "moe_router_group_topk": experts.top_groups if experts.groups > 1 else None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if experts.auxiliary_loss else "none",
        "moe_aux_loss_coeff": experts.auxiliary_loss,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_token_dispatcher_type": "alltoall",
    }


_SCORES_OF_A_GROUP = 2
