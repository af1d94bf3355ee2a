"""A mixture of experts, from Megatron-Core's own modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from shared.architecture.architecture import Architecture
from shared.architecture.version_1 import Experts


def experts_of(experts: Experts) -> Callable[..., Any]:
    """Builds the layer's experts."""
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    each = MLPSubmodules(linear_fc1=with_bias(ColumnParallelLinear), linear_fc2=with_bias(ShareOfBias))
    return partial(
        MoELayer,
        submodules=MoESubmodules(
            experts=partial(SequentialMLP, submodules=each if experts.bias else linear),
            shared_experts=partial(SharedExpertMLP, submodules=linear),
            router=_router(experts),
        ),
    )


def with_bias(linear: Callable[..., Any]) -> Callable[..., Any]:
    """`linear` with a bias, whatever Megatron-Core's switch for all layers says."""
    return lambda *args, **kwargs: linear(*args, **{**kwargs, "bias": True})


class ShareOfBias(RowParallelLinear):
    """An expert's second layer that gives out this tensor-parallel process's share of its bias.

    Megatron-Core adds an expert's bias before it sums what the processes that share the expert answer, and so
    refuses biases where there are several. It adds in place, which autograd forbids on what a reduction gave out.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As Megatron-Core's."""
        output, bias = super().forward(*args, **kwargs)
        return output.clone(), bias / self.tp_group.size()


class BiasedRouter(TopKRouter):
    """Megatron-Core's router with the bias that it has where all linear layers have one."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.bias = torch.nn.Parameter(torch.empty_like(self.weight[:, 0]))
        if config.perform_initialization:
            torch.nn.init.normal_(self.bias, std=config.init_method_std)
        self.bias.sequence_parallel = config.sequence_parallel


class _BestGroups:
    """Chooses groups by their best scores, where Megatron-Core asks whoever replays a choice."""

    def __init__(self, score_of: int) -> None:
        self.score_of = score_of
        self.layer_number: int | None = None  # Megatron-Core tells it

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int,
        group_topk: int,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores `[tokens, experts]` to those of the chosen and their indices, `[tokens, topk]` each."""
        groups = scores.view(len(scores), num_groups, -1)
        best = groups.topk(self.score_of, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
        left_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
        return default_compute_topk(groups.masked_fill(left_out[..., None], -torch.inf).flatten(1), topk)


class GroupRouter(TopKRouter):
    """Megatron-Core's router, with groups of experts compared by as many scores as the architecture says.

    Megatron-Core's own compares them by the sum of `top_k / top_groups` scores.
    """

    def __init__(self, *args: Any, score_of: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_replay = _BestGroups(score_of)


def _router(experts: Experts) -> Callable[..., Any]:
    if experts.bias:
        return BiasedRouter
    if experts.groups == 1 or experts.top_k // experts.top_groups == experts.group_score_of:
        return TopKRouter
    return partial(GroupRouter, score_of=experts.group_score_of)


_BALANCING = {"batch": "aux_loss", "sequence": "seq_aux_loss"}


def experts_config(architecture: Architecture, experts: Experts) -> dict[str, Any]:
    """Fields of `TransformerConfig`."""
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
        "moe_router_load_balancing_type": _BALANCING[experts.auxiliary_loss_of] if experts.auxiliary_loss else "none",
        "moe_aux_loss_coeff": experts.auxiliary_loss,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_token_dispatcher_type": "alltoall",
    }
