"""TransformerEngine's linear layers and norms, through Megatron-Core's wrappers (megatron/core/extensions/transformer_engine.py).

A norm that only one linear layer reads is part of that layer (TransformerEngine's LayerNormLinear): the names that checkpoints
have with every backend. Directories are the same both ways.

Not by TransformerEngine: core attention, which `shared.kernels.attention` chooses (TransformerEngine's is one of its kernels);
embedding, output layer and router, which Megatron-Core has of its own with TransformerEngine, too; and norms of `left_out`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as extensions
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from shared.architecture.architecture import Architecture, Attention, Norm
from shared.kernels.fp8.recipes import Fp8Recipe
from shared.model import te_fp8
from shared.model.backend import LocalBackend
from shared.model.norm import NormBuilder


def _norm_left_out(norm: Norm) -> str | None:
    """The norm in words if TransformerEngine does not compute it. It has RMSNorm, zero-centred too, and LayerNorm with a bias."""
    if not norm.affine:
        return "LayerNorm without weights"
    if norm.kind == "layernorm" and not norm.bias:
        return "LayerNorm without bias"
    return None


_QK_NORMS_LEFT_OUT = {"each_head": "QK norm with weights per head", "projection": "QK norm over the whole projection"}


def left_out(architecture: Architecture) -> list[str]:
    """What the local backend computes with `TEBackend`, too: norms that TransformerEngine lacks, as noun phrases."""
    layers = [*architecture.kinds, *((architecture.mtp.layer,) if architecture.mtp else ())]
    norms = [layer.norm for layer in layers] + [architecture.head.norm, architecture.embedding.norm]
    found = [_norm_left_out(norm) for norm in norms if norm]
    for layer in layers:
        if isinstance(layer.mixer, Attention) and layer.mixer.qk_norm:
            found.append(_QK_NORMS_LEFT_OUT.get(layer.mixer.qk_norm))
    return list(dict.fromkeys(each for each in found if each))


@dataclass
class TEBackend(LocalBackend):
    """TransformerEngine's modules on GPUs; the local backend's where `left_out` names them.

    Attributes:
        fp8: recipe of linear layers; None: in the precision of the weights.
    """

    fp8: Fp8Recipe | None = None

    def config_fields(self) -> dict[str, Any]:
        return te_fp8.config_fields(self.fp8) if self.fp8 else {}

    def column_parallel_linear(self, layer: int, *, expert: bool = False) -> type:
        """Of experts: one module for all experts of a rank, with the number of experts as its first argument."""
        return extensions.TEColumnParallelGroupedLinear if expert else extensions.TEColumnParallelLinear

    def row_parallel_linear(self, layer: int, *, expert: bool = False) -> type:
        """As `column_parallel_linear`."""
        return extensions.TERowParallelGroupedLinear if expert else extensions.TERowParallelLinear

    def column_parallel_layer_norm_linear(self, norm: Norm, layer: int) -> type | None:
        return None if _norm_left_out(norm) else _layer_norm_linear(norm)

    def norm(self, norm: Norm, *, extra_state: bool) -> NormBuilder:
        if _norm_left_out(norm):
            return super().norm(norm, extra_state=extra_state)

        def build(*, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> torch.nn.Module:
            built: torch.nn.Module = extensions.TENorm(_with_norm(config, norm), hidden_size, eps=norm.epsilon)
            if not extra_state:
                built.register_state_dict_post_hook(_drop_extra_state)
            return built

        return build

    def qk_norms(self, attention: Attention, norm: Norm) -> tuple[NormBuilder | None, NormBuilder | None]:
        if attention.qk_norm == "head":
            return (self.norm(norm, extra_state=True),) * 2
        return super().qk_norms(attention, norm)

    def grouped_mlp_modules(self, submodules: MLPSubmodules) -> Callable[..., Any]:
        """The linear layers are those of all experts."""
        grouped = GroupedMLPSubmodules(linear_fc1=submodules.linear_fc1, linear_fc2=submodules.linear_fc2)
        return partial(TEGroupedMLP, submodules=grouped)


@cache
def _layer_norm_linear(norm: Norm) -> type:
    class LayerNormColumnParallelLinear(extensions.TELayerNormColumnParallelLinear):
        """TELayerNormColumnParallelLinear with `norm`, whatever the configuration says."""

        def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
            super().__init__(*args, config=_with_norm(config, norm), **kwargs)

    return LayerNormColumnParallelLinear


def _with_norm(config: TransformerConfig, norm: Norm) -> TransformerConfig:
    """The configuration, with `norm` as its norm: Megatron-Core's wrappers have no arguments for these fields."""
    wanted = {
        "normalization": "LayerNorm" if norm.kind == "layernorm" else "RMSNorm",
        "layernorm_zero_centered_gamma": norm.zero_centered_gamma,
        "layernorm_epsilon": norm.epsilon,
    }
    if all(getattr(config, name) == value for name, value in wanted.items()):
        return config
    own = copy.copy(config)
    for name, value in wanted.items():
        setattr(own, name, value)
    return own


def _drop_extra_state(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Checkpoints have none for this norm."""
    del state[prefix + "_extra_state"]
