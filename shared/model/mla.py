"""Multi-head latent attention, MLA (DeepSeek V2): Megatron-Core's module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from shared.architecture.architecture import LatentAttention
from shared.architecture.norm import Norm
from shared.model.backend import Backend, LocalBackend
from shared.model.rope import RotaryAngles, amplitude

# Checkpoints carry TransformerEngine's names, where a norm in front of a projection is a part of it.
MLA_CHECKPOINT_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


class _AnglesAndAmplitude(RotaryAngles):
    """Angles, and the factor of their sines and cosines, as Megatron-Core's YaRN returns them."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, float]:
        """Angles `[sequence, 1, 1, qk_rope_head_dim]` in radians, and the factor."""
        return super().forward(*args, **kwargs), amplitude(self.rotary)


class LatentSelfAttention(MLASelfAttention):
    """Megatron-Core's MLA with the frequencies and norms of a `LatentAttention`.

    Tensor parallelism needs sequence parallelism.
    """

    def __init__(
        self,
        config: Any,
        submodules: MLASelfAttentionSubmodules,
        *args: Any,
        mla: LatentAttention,
        max_position_embeddings: int,
        **kwargs: Any,
    ) -> None:
        # Megatron-Core knows the classes of the down-projections by name: its own are built, a backend's take their place.
        own = LocalBackend().column_parallel_linear(0)
        down_projections = {"linear_q_down_proj": own, "linear_kv_down_proj": own}
        super().__init__(config, replace(submodules, **down_projections), *args, **kwargs)
        if mla.q_lora_rank is not None and submodules.linear_q_down_proj is not own:
            self.linear_q_down_proj = self._down_projection(
                submodules.linear_q_down_proj, mla.q_lora_rank, "q_down_proj"
            )
        if submodules.linear_kv_down_proj is not own:
            size = mla.kv_lora_rank + mla.qk_rope_head_dim
            self.linear_kv_down_proj = self._down_projection(submodules.linear_kv_down_proj, size, "kv_down_proj")
        self.rotary_pos_emb = _AnglesAndAmplitude(mla.rotary, mla.qk_rope_head_dim, max_position_embeddings)

    def _down_projection(self, linear: Any, size: int, name: str) -> torch.nn.Module:
        built: torch.nn.Module = linear(
            self.config.hidden_size,
            size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=name,
            skip_weight_param_allocation=False,
            tp_group=self.pg_collection.tp,
        )
        return built

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


def mla_spec(
    mla: LatentAttention, norm: Norm, max_position_embeddings: int, backend: Backend, layer: int
) -> ModuleSpec:
    """Attention of a layer's spec; `layer` as `Backend` counts them."""
    low_rank_norm = backend.norm(replace(norm, epsilon=mla.norm_epsilon), checkpointed=False)
    column = backend.column_parallel_linear(layer)
    return ModuleSpec(
        module=LatentSelfAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "mla": mla,
            "max_position_embeddings": max_position_embeddings,
        },
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=column,
            core_attention=ModuleSpec(module=backend.core_attention(), params={"attention": mla}),
            linear_proj=backend.row_parallel_linear(layer),
            q_layernorm=low_rank_norm,
            kv_layernorm=low_rank_norm,
        ),
    )


def mla_config(mla: LatentAttention) -> dict[str, Any]:
    """Fields of `MLATransformerConfig`."""
    scaling = mla.rotary.scaling
    yarn = scaling if scaling and scaling.kind == "yarn" else None
    return {
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "qk_layernorm": True,
        "rope_type": "yarn",  # the kind that has a factor of sines and cosines; frequencies are RotaryAngles'
        "rotary_base": mla.rotary.theta,
        # Softmax scale: 1 / sqrt(head_dim), times the square of 0.1 mscale_all_dim ln(factor) + 1.
        "rotary_scaling_factor": yarn.factor if yarn else 1.0,
        "mscale_all_dim": (yarn.mscale_all_dim or 0.0) if yarn else 0.0,
    }
