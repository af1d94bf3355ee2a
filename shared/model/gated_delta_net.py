"""Gated delta net: Megatron-Core's module with a forward pass in plain torch instead of Triton kernels.

Names, shapes and sharded_state_dict are Megatron-Core's. Packed sequences are supported through segments.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from shared.architecture import attention as values
from shared.architecture.architecture import Architecture
from shared.architecture.norm import Norm
from shared.kernels.attention.masks import segment_positions
from shared.kernels.gated_delta_rule import gated_delta_rule
from shared.model.backend import Backend

# Checkpoints have the names of TransformerEngine's LayerNormLinear: the norm is part of the linear layer.
DELTA_NET_CHECKPOINT_KEYS = {"input_layernorm.": "self_attention.in_proj.layer_norm_"}


class TorchGatedDeltaNet(GatedDeltaNet):
    """Replaces self attention in a layer; heads are split over tensor-parallel ranks.

    Tensor parallelism requires sequence parallelism: without it the gradient of out_norm is not summed over ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        net: values.GatedDeltaNet,
        name: str | None = None,
    ) -> None:
        # Skip the parent's __init__, which requires the Triton kernels; set the attributes that its sharded_state_dict
        # and reset_parameters read.
        MegatronModule.__init__(self, config)
        tensor = pg_collection.tp.size()
        self.layer_number, self.pg_collection = layer_number, pg_collection
        self.tp_size, self.cp_size, self.conv_bias, self.conv_init = tensor, 1, False, None
        self.A_init_range = (0.01, 16.0)
        self.num_value_heads, self.key_head_dim, self.value_head_dim = (
            net.value_heads,
            net.key_head_dim,
            net.value_head_dim,
        )
        self.qk_dim_local_tp, self.v_dim_local_tp = net.key_size // tensor, net.value_size // tensor
        self.num_v_heads_local_tp = net.value_heads // tensor
        self._setup_variant_attrs()
        self.in_proj_dim = 2 * net.key_size + 2 * net.value_size + self.in_proj_extra_dim
        self.in_proj = submodules.in_proj(
            config.hidden_size,
            self.in_proj_dim,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=pg_collection.tp,
        )
        self.conv_dim_local_tp = 2 * self.qk_dim_local_tp + self.v_dim_local_tp
        device, dtype = torch.cuda.current_device(), config.params_dtype
        channels = self.conv_dim_local_tp
        self.conv1d = torch.nn.Conv1d(
            channels, channels, net.conv_kernel, groups=channels, bias=False, device=device, dtype=dtype
        )
        self.dt_bias = torch.nn.Parameter(torch.empty(self.num_v_heads_local_tp, dtype=dtype, device=device))
        self.A_log = torch.nn.Parameter(torch.empty(self.num_v_heads_local_tp, dtype=dtype, device=device))
        for parameter in (self.conv1d.weight, self.dt_bias, self.A_log):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        self.out_norm = submodules.out_norm(config=config, hidden_size=net.value_head_dim, eps=config.layernorm_epsilon)
        self.out_proj = submodules.out_proj(
            net.value_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=pg_collection.tp,
        )
        self.reset_parameters()

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> tuple[torch.Tensor, None]:
        """`[sequence, batch, hidden]`, shape unchanged; `others` (attention, inference) are ignored.

        `attention_mask`: segments `[batch, sequence]`, or None. State and convolution are reset at each segment.
        """
        projected, _ = self.in_proj(hidden_states)
        # [batch, sequence, ..] from here on.
        mixed, gate, beta, alpha = projected.transpose(0, 1).split(self.feat_dim_split, dim=-1)
        offsets, segments = None, None
        if attention_mask is not None:
            offsets = segment_positions(attention_mask)
            segments = (offsets == 0).cumsum(1)  # non-decreasing
        mixed = functional.silu(causal_convolution(mixed, self.conv1d.weight[:, 0], offsets))
        query, key, value = mixed.split([self.qk_dim_local_tp, self.qk_dim_local_tp, self.v_dim_local_tp], dim=-1)
        query, key = (x.unflatten(-1, (-1, self.key_head_dim)) for x in (query, key))
        value = value.unflatten(-1, (-1, self.value_head_dim))
        shared = value.shape[2] // key.shape[2]  # value heads per key head
        query, key = (x.repeat_interleave(shared, dim=2) for x in (query, key))
        decay = -self.A_log.float().exp() * functional.softplus(alpha.float() + self.dt_bias.float())
        answer = gated_delta_rule(query, key, value, decay, beta.float().sigmoid(), segments)
        normed = self.out_norm(answer) * functional.silu(gate.unflatten(-1, (-1, self.value_head_dim)).float())
        return self.out_proj(normed.to(answer.dtype).flatten(2).transpose(0, 1).contiguous())


def causal_convolution(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """Causal depthwise convolution over the sequence.

    Args:
        x: `[batch, sequence, channels]`.
        weight: `[channels, kernel]`; the last column is for the current token.
        offsets: `[batch, sequence]`, position of each token in its segment; None: one segment.
    """
    kernel = weight.shape[1]
    mixed = x * weight[:, -1]
    for back in range(1, min(kernel, x.shape[1])):
        earlier = functional.pad(x[:, :-back], (0, 0, back, 0))
        if offsets is not None:
            earlier = earlier * (offsets >= back)[..., None]
        mixed = mixed + earlier * weight[:, -1 - back]
    return mixed


def delta_net_spec(
    net: values.GatedDeltaNet, norm: Norm, backend: Backend, layer: int, fused: type | None = None
) -> ModuleSpec:
    """Gated delta net spec of a layer; `layer`: index, as in `Backend`. `fused`: class of in_proj with the layer's norm."""
    return ModuleSpec(
        module=TorchGatedDeltaNet,
        params={"net": net},
        submodules=GatedDeltaNetSubmodules(
            in_proj=fused or backend.column_parallel_linear(layer),
            out_norm=backend.norm(norm, extra_state=True),
            out_proj=backend.row_parallel_linear(layer),
        ),
    )


def delta_net_config(architecture: Architecture, net: values.GatedDeltaNet) -> dict[str, Any]:
    """Fields of `TransformerConfig`."""
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(isinstance(layer.mixer, values.GatedDeltaNet)) for layer in architecture.layers],
        "linear_conv_kernel_dim": net.conv_kernel,
        "linear_key_head_dim": net.key_head_dim,
        "linear_value_head_dim": net.value_head_dim,
        "linear_num_key_heads": net.key_heads,
        "linear_num_value_heads": net.value_heads,
    }
