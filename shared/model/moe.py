"""MoE layers from Megatron-Core's modules."""

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
    """Builder of a layer's MoE; `layer`: index, as in `Backend`."""
    column = backend.column_parallel_linear(layer, expert=True)
    row = backend.row_parallel_linear(layer, expert=True)
    of_experts = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    if moe.expert.bias:
        of_experts = MLPSubmodules(linear_fc1=_with_bias(column), linear_fc2=_with_bias_over_tp(row))
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
    """`linear` with a bias, whatever `add_bias_linear` says."""
    return lambda *args, **kwargs: linear(*args, **{**kwargs, "bias": True})


def _with_bias_over_tp(linear: Callable[..., Any]) -> Callable[..., Any]:
    """An expert's fc2 that returns bias / expert_tensor_parallel_size.

    Megatron-Core adds an expert's bias before the all-reduce over expert-tensor-parallel ranks, and refuses biases with
    several ranks. It adds in place, hence the clone: autograd forbids that on the output of a reduction.
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
    """Megatron-Core's router with a bias (Megatron-Core: with `add_bias_linear` only)."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.bias = torch.nn.Parameter(torch.empty_like(self.weight[:, 0]))
        if config.perform_initialization:
            torch.nn.init.normal_(self.bias, std=config.init_method_std)
        self.bias.sequence_parallel = config.sequence_parallel


class _GroupTopK:
    """Group-limited top-k with group score = sum of the `score_top` highest scores, through the router replay hook."""

    def __init__(self, score_top: int) -> None:
        self.score_top = score_top
        self.layer_number: int | None = None  # set by Megatron-Core

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int,
        group_topk: int,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores `[tokens, experts]` -> scores and indices of the top-k experts, `[tokens, topk]` each."""
        groups = scores.view(len(scores), num_groups, -1)
        best = groups.topk(self.score_top, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
        left_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
        return default_compute_topk(groups.masked_fill(left_out[..., None], -torch.inf).flatten(1), topk)


class GroupRouter(TopKRouter):
    """Megatron-Core's router with group score = sum of the top `score_top` scores (Megatron-Core: top_k / top_groups)."""

    def __init__(self, *args: Any, score_top: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_replay = _GroupTopK(score_top)


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
        # Softmax before top-k: scores unnormalised. Softmax after top-k: scores divided by their sum.
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
