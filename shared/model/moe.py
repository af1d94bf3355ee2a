"""MoE layers from Megatron-Core's modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from shared.architecture.architecture import Architecture, MoE
from shared.model.backend import Backend
from shared.model.router import router_of


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
            router=router_of(moe),
        ),
    )


def _with_bias(linear: Callable[..., Any]) -> Callable[..., Any]:
    """`linear` with a bias, whatever `add_bias_linear` says."""
    return lambda *args, **kwargs: linear(*args, **{**kwargs, "bias": True})


def _with_bias_over_tp(linear: Callable[..., Any]) -> Callable[..., Any]:
    """An expert's fc2 that returns bias / expert_tensor_parallel_size.

    Megatron-Core adds an expert's bias before the all-reduce over expert-tensor-parallel ranks, and refuses biases with
    several ranks. It adds in place, hence the clone: autograd forbids that on the output of a reduction. A linear layer of all
    experts returns a list of biases, which are added out of place.
    """

    def share(
        module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor | list[torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor]]:
        summed, bias = output
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
        if isinstance(bias, list):
            return summed, [each / ranks for each in bias]
        return summed.clone(), bias / ranks

    def build(*args: Any, **kwargs: Any) -> Any:
        built = linear(*args, **{**kwargs, "bias": True})
        built.register_forward_hook(share)
        for name, parameter in built.named_parameters():
            if name.startswith("bias"):  # Megatron-Core sums its gradient over tensor-parallel ranks
                parameter.sequence_parallel = kwargs["config"].sequence_parallel
        return built

    return build


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
