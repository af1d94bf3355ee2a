"""Multi-head latent attention, MLA (DeepSeek V2), on Megatron-Core's module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from shared.architecture.architecture import LatentAttention
from shared.architecture.norm import Norm
from shared.kernels.rotary import rotate
from shared.model.backend import Backend, LocalBackend
from shared.model.rope import RotaryAngles

# Checkpoints have the names of TransformerEngine's LayerNormLinear: the norm is part of the linear layer.
MLA_CHECKPOINT_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


class LatentSelfAttention(MLASelfAttention):
    """Megatron-Core's MLA with the RoPE and norms of a `LatentAttention`. TP requires sequence parallelism.

    All layers share one `RotaryAngles`, and its cos and sin.
    """

    def __init__(
        self,
        config: Any,
        submodules: MLASelfAttentionSubmodules,
        *args: Any,
        mla: LatentAttention,
        angles: RotaryAngles,
        **kwargs: Any,
    ) -> None:
        # Megatron-Core accepts its own down-projection classes only: build these, then replace them by the backend's.
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
        self.rotary_pos_emb = angles

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
        """The spec unchanged: Megatron-Core would add a q_layernorm without q_lora_rank."""
        return {name: getattr(submodules, name) for name in _RESOLVED}

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: None = None,
        position_ids: None = None,
        packed_seq_params: None = None,
        inference_context: None = None,
    ) -> tuple[torch.Tensor, ...]:
        """q, k and v `[sequence, batch, heads, head_dim]`, and what q and k, v are projected from.

        Equal to the bit to Megatron-Core's, which makes angles in each layer, and cos and sin for its queries and its keys.
        """
        assert packed_seq_params is None
        assert inference_context is None
        length = self.rotary_pos_emb.get_rotary_seq_len(None, None, hidden_states, self.config, None)
        tables = self.rotary_pos_emb.tables(length, hidden_states.dtype)
        q_latent, kv_latent = self._qkv_down_projection(hidden_states)
        kv_latent, k_rope = kv_latent.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], -1)
        if self.config.sequence_parallel and self.pg_collection.tp.size() > 1:
            k_rope = gather_from_sequence_parallel_region(k_rope, group=self.pg_collection.tp)
        if self.config.q_lora_rank is not None:
            q_latent = self.q_layernorm(q_latent)
        kv_latent = self.kv_layernorm(kv_latent)
        if not self.recompute_up_proj:
            return *self._project_up(q_latent, kv_latent, k_rope, *tables), q_latent, kv_latent
        self.qkv_up_checkpoint = CheckpointWithoutOutput(fp8=self.config.fp8 or self.config.fp4)
        projected = self.qkv_up_checkpoint.checkpoint(self._project_up, q_latent, kv_latent, k_rope, *tables)
        return *projected, q_latent, kv_latent

    def _project_up(
        self,
        q_latent: torch.Tensor,
        kv_latent: torch.Tensor,
        k_rope: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q and k after RoPE, and v, `[sequence, batch, heads, head_dim]`; `k_rope` `[sequence, batch, qk_rope_head_dim]`."""
        config, heads = self.config, self.num_attention_heads_per_partition
        up_projection = self.linear_q_up_proj if config.q_lora_rank is not None else self.linear_q_proj
        q = up_projection(q_latent)[0].unflatten(-1, (heads, self.q_head_dim))
        q_nope, q_rope = q.split([config.qk_head_dim, config.qk_pos_emb_head_dim], -1)
        kv = self.linear_kv_up_proj(kv_latent)[0].unflatten(-1, (heads, config.qk_head_dim + config.v_head_dim))
        k_nope, value = kv.split([config.qk_head_dim, config.v_head_dim], -1)
        q_rope, k_rope = (_rotate_pairs(x, cos, sin) for x in (q_rope, k_rope.unsqueeze(-2)))
        query = torch.cat((q_nope, q_rope), -1)
        key = torch.cat((k_nope, k_rope.expand(-1, -1, heads, -1)), -1)
        return query, key, value.contiguous()

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[sequence, batch, hidden]` -> `[.., q_lora_rank]` (hidden without rank), `[.., kv_lora_rank + qk_rope_head_dim]`.

        Returns all columns of this rank's sequence shard. Then k_rope is all-gathered along the sequence; the backward of
        that sums its gradient over all ranks' heads. After a gather of columns, k_rope would get the gradient
        of this rank's heads only.
        """
        queries = hidden_states
        if self.config.q_lora_rank is not None:
            queries = self._columns_to_sequence(self.linear_q_down_proj(hidden_states)[0])
        return queries, self._columns_to_sequence(self.linear_kv_down_proj(hidden_states)[0])

    def _columns_to_sequence(self, columns: torch.Tensor) -> torch.Tensor:
        """From sharded columns to a sharded sequence."""
        group = self.pg_collection.tp
        if group.size() == 1:
            return columns
        return scatter_to_sequence_parallel_region(gather_from_tensor_model_parallel_region(columns, group), group)


def _rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of pairs (2i, 2i + 1), as checkpoints have them, put in halves: x `[sequence, batch, heads, qk_rope_head_dim]`."""
    return rotate(torch.cat((x[..., 0::2], x[..., 1::2]), -1), cos, sin, interleaved=False)


_RESOLVED = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")


def mla_spec(mla: LatentAttention, norm: Norm, angles: RotaryAngles, backend: Backend, layer: int) -> ModuleSpec:
    """MLA spec of a layer; `angles`: shared by the layers; `layer`: index, as in `Backend`."""
    low_rank = replace(norm, epsilon=mla.norm_epsilon)
    column = backend.column_parallel_linear(layer)
    fused = backend.column_parallel_layer_norm_linear(low_rank, layer)
    low_rank_norm = IdentityOp if fused else backend.norm(low_rank, extra_state=False)
    return ModuleSpec(
        module=LatentSelfAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "mla": mla,
            "angles": angles,
        },
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=fused or column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=fused or column,
            core_attention=ModuleSpec(
                module=backend.core_attention(),
                params={"attention": mla, "attention_backend": backend.attention_backend},
            ),
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
        "rope_type": "yarn",  # the type with a factor in the softmax scale; RotaryAngles has the rest
        "rotary_base": mla.rotary.theta,
        # Softmax scale: (0.1 mscale_all_dim ln(factor) + 1)^2 / sqrt(head_dim).
        "rotary_scaling_factor": yarn.factor if yarn else 1.0,
        "mscale_all_dim": (yarn.mscale_all_dim or 0.0) if yarn else 0.0,
    }
