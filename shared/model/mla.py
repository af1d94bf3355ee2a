"""Multi-head latent attention (DeepSeek V2), from Megatron-Core's own module."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from shared.architecture.architecture import Architecture
from shared.architecture.version_1 import Latent as LatentAttention
from shared.model.attention import CoreAttention
from shared.model.norm import norm_of
from shared.model.rope import Rotation

# Checkpoints carry TransformerEngine's names, where a norm in front of a projection is a part of it.
LATENT_CHECKPOINT_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


class _Rotation(Rotation):
    """The architecture's angles, and the factor of their sines and cosines."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, float]:  # as Megatron-Core's YaRN answers
        """Angles `[sequence, 1, 1, rotated]` in radians, and the factor."""
        scaling = self.architecture.rope_scaling
        return super().forward(*args, **kwargs), scaling.amplitude if scaling else 1.0


class LatentSelfAttention(MLASelfAttention):
    """Megatron-Core's latent attention with the architecture's frequencies and norms.

    Tensor parallelism needs sequence parallelism beside it.
    """

    def __init__(self, config: Any, *args: Any, architecture: Architecture, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.rotary_pos_emb = _Rotation(architecture)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """The spec as it is: Megatron-Core would put a norm in front of queries that are projected directly."""
        return {name: getattr(submodules, name) for name in _RESOLVED}

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[sequence, batch, hidden]` to `[.., q_lora_rank]` (or the same) and `[.., kv_lora_rank + rotated]`.

        Whole vectors of the process's part of the sequence, so that Megatron-Core gathers the rotated key along the
        sequence, which sums its gradient over the processes' heads. Gathered as columns it would have that of the
        process's own heads only.
        """
        queries = hidden_states
        if self.config.q_lora_rank is not None:
            queries = self._whole(self.linear_q_down_proj(hidden_states)[0])
        return queries, self._whole(self.linear_kv_down_proj(hidden_states)[0])

    def _whole(self, columns: torch.Tensor) -> torch.Tensor:
        group = self.pg_collection.tp
        if group.size() == 1:
            return columns
        return scatter_to_sequence_parallel_region(gather_from_tensor_model_parallel_region(columns, group), group)


_RESOLVED = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")


def latent_attention(architecture: Architecture, latent: LatentAttention) -> ModuleSpec:
    """Attention of a layer's spec."""
    plain = norm_of(architecture, checkpointed=False)

    def norm(*, config: Any, hidden_size: int, eps: float) -> torch.nn.Module:
        built: torch.nn.Module = plain(config=config, hidden_size=hidden_size, eps=latent.norm_epsilon)
        return built

    return ModuleSpec(
        module=LatentSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "architecture": architecture},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=ModuleSpec(module=CoreAttention, params={"architecture": architecture}),
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            kv_layernorm=norm,
        ),
    )


def latent_config(architecture: Architecture, latent: LatentAttention) -> dict[str, Any]:
    """Fields of `MLATransformerConfig`."""
    scaling = architecture.rope_scaling
    stretched = scaling is not None and scaling.kind == "yarn"
    return {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "qk_layernorm": True,
        "rope_type": "yarn",  # whose rotation has a factor; what it is we say ourselves
        "rotary_base": architecture.rope_theta,
        # The scores' scale: 1 / sqrt(head_dim), times the square of 0.1 mscale_all_dim ln(factor) + 1.
        "rotary_scaling_factor": scaling.factor if scaling and stretched else 1.0,
        "mscale_all_dim": (scaling.mscale_all_dim or 0.0) if scaling and stretched else 0.0,
    }
