"""A mixture of experts, from Megatron-Core's own modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from shared.architecture.architecture import Architecture, MoE
from shared.model.backend import Backend


def moe_spec(moe: MoE, backend: Backend, layer: int) -> Callable[..., Any]:
    """Builder of a layer's MoE; `layer` as `Backend` counts them."""
    column = backend.column_parallel_linear(layer, expert=True)
    row = backend.row_parallel_linear(layer, expert=True)
    of_experts = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    if moe.expert.bias:
        of_experts = MLPSubmodules(linear_fc1=_with_bias(column), linear_fc2=_with_share_of_bias(row))
    return partial(
        MoELayer,
        submodules=MoESubmodules(
            experts=backend.grouped_mlp_modules(of_experts),
            shared_experts=partial(
                SharedExpertMLP,
                submodules=MLPSubmodules(
                    linear_fc1=backend.column_parallel_linear(layer),
                    linear_fc2=backend.row_parallel_linear(layer),
                ),
            ),
            router=_router(moe),
        ),
    )


def _with_bias(linear: Callable[..., Any]) -> Callable[..., Any]:
    """`linear` with a bias, whatever Megatron-Core's switch for all layers says."""
    return lambda *args, **kwargs: linear(*args, **{**kwargs, "bias": True})


def _with_share_of_bias(linear: Callable[..., Any]) -> Callable[..., Any]:
    """An expert's fc2 that returns this tensor-parallel rank's share of its bias.

    Megatron-Core adds an expert's bias before it sums the outputs of the ranks that share the expert, and so refuses
    biases where there are several. It adds in place, which autograd forbids on the output of a reduction.
    """

    def share(
        module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        summed, bias = output
        return summed.clone(), bias / parallel_state.get_expert_tensor_parallel_world_size()

    def build(*args: Any, **kwargs: Any) -> Any:
        built = linear(*args, **{**kwargs, "bias": True})
        built.register_forward_hook(share)
        return built

    return build


class BiasedRouter(TopKRouter):
    """Megatron-Core's router with the bias that it has where all linear layers have one."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.bias = torch.nn.Parameter(torch.empty_like(self.weight[:, 0]))
        if config.perform_initialization:
            torch.nn.init.normal_(self.bias, std=config.init_method_std)
        self.bias.sequence_parallel = config.sequence_parallel


class _BestGroups:
    """Chooses groups by the sum of their best scores, in the place of Megatron-Core's router replay."""

    def __init__(self, score_top: int) -> None:
        self.score_top = score_top
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
        best = groups.topk(self.score_top, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
        left_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
        return default_compute_topk(groups.masked_fill(left_out[..., None], -torch.inf).flatten(1), topk)


class GroupRouter(TopKRouter):
    """Megatron-Core's router; a group's score is the sum of its `score_top` best, not of its `top_k / top_groups` best."""

    def __init__(self, *args: Any, score_top: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_replay = _BestGroups(score_top)


def _router(moe: MoE) -> Callable[..., Any]:
    if moe.router_bias:
        return BiasedRouter
    if moe.groups == 1 or moe.top_k // moe.top_groups == moe.group_score_top:
        return TopKRouter
    return partial(GroupRouter, score_top=moe.group_score_top)


_BALANCING = {"batch": "aux_loss", "sequence": "seq_aux_loss"}


def moe_config(architecture: Architecture, moe: MoE) -> dict[str, Any]:
    """Fields of `TransformerConfig`."""
    sparse = [int(isinstance(layer.mlp, MoE)) for layer in architecture.layers]
    return {
        "num_moe_experts": moe.experts,
        "moe_layer_freq": 1 if architecture.homogeneous else sparse,
        "moe_ffn_hidden_size": moe.expert.ffn_hidden_size,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.score,
        # Softmax before the choice leaves the scores as they are, after it divides them by their sum.
        "moe_router_pre_softmax": moe.score == "softmax" and not moe.normalized,
        "moe_router_topk_scaling_factor": moe.scaling if moe.scaling != 1.0 else None,
        "moe_router_enable_expert_bias": moe.correction_bias,
        "moe_router_num_groups": moe.groups if moe.groups > 1 else None,
        "moe_router_group_topk": moe.top_groups if moe.groups > 1 else None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": _BALANCING[moe.auxiliary_loss_over] if moe.auxiliary_loss else "none",
        "moe_aux_loss_coeff": moe.auxiliary_loss,
        "moe_shared_expert_intermediate_size": moe.shared.ffn_hidden_size if moe.shared else None,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_token_dispatcher_type": "alltoall",
    }
