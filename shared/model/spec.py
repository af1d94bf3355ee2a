"""Megatron-Core layer specs of an architecture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from shared.architecture.architecture import (
    MLP,
    Architecture,
    Attention,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    MoE,
    Norm,
    Rotary,
)
from shared.model.attention import Rotary2DSelfAttention, RotarySelfAttention, clipped
from shared.model.backend import Backend
from shared.model.dense_mlp import DenseMLP
from shared.model.gated_delta_net import DELTA_NET_CHECKPOINT_KEYS, delta_net_spec
from shared.model.mla import MLA_CHECKPOINT_KEYS, mla_spec
from shared.model.moe import moe_spec
from shared.model.mtp import MTPLayer
from shared.model.rope import RotaryAngles
from shared.model.support import needs_general_transformer_layer
from shared.model.transformer_layer import GeneralTransformerLayer

# Checkpoints have the names of TransformerEngine's LayerNormLinear: the norm is part of the linear layer.
_ATTENTION_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
# Not for MoE: pre_mlp_layernorm stays a module, because the router reads its output, too.
_DENSE_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def model_rotary(architecture: Architecture) -> Rotary | None:
    """RoPE of the first attention layer that has it: GPTModel computes its angles once; layers with other RoPE their own."""
    mixers = (layer.mixer for layer in architecture.kinds)
    return next((m.rotary for m in mixers if isinstance(m, Attention | LatentAttention) and m.rotary), None)


def block_spec(
    architecture: Architecture, backend: Backend, first_layer: int, num_layers: int
) -> TransformerBlockSubmodules:
    """Specs of `num_layers` layers from `first_layer` on, and of the final norm."""
    spec = _Spec(architecture, backend)
    norm = architecture.head.norm
    return TransformerBlockSubmodules(
        layer_specs=[
            spec.layer(architecture.layers[index], index) for index in range(first_layer, first_layer + num_layers)
        ],
        layer_norm=backend.norm(norm, extra_state=True) if norm else None,
    )


def mtp_spec(architecture: Architecture, backend: Backend) -> MultiTokenPredictionBlockSubmodules | None:
    """Spec of the MTP layers; None without MTP."""
    mtp = architecture.mtp
    if mtp is None:
        return None
    spec = _Spec(architecture, backend)
    norm = backend.norm(mtp.layer.norm, extra_state=True)
    layers = [
        ModuleSpec(
            module=MTPLayer,
            submodules=MultiTokenPredictionLayerSubmodules(
                enorm=norm,
                hnorm=norm,
                layer_norm=norm,
                eh_proj=backend.column_parallel_linear(index),
                mtp_model_layer=spec.layer(mtp.layer, index),
            ),
        )
        for index in range(architecture.num_layers, architecture.num_layers + mtp.depth)
    ]
    return MultiTokenPredictionBlockSubmodules(layer_specs=layers)


class _Spec:
    """Layer specs of one model. Layers with equal RoPE share one RotaryAngles module."""

    def __init__(self, architecture: Architecture, backend: Backend) -> None:
        self.backend = backend
        self.max_position_embeddings = architecture.max_position_embeddings
        self.prefix = architecture.prefix
        self.angles: dict[tuple[Rotary, int], RotaryAngles] = {}

    def layer(self, layer: Layer, index: int) -> ModuleSpec:
        """`index`: of the layer, as in `Backend`."""
        backend, latent, dense = self.backend, isinstance(layer.mixer, LatentAttention), isinstance(layer.mlp, MLP)
        plain_norm = backend.norm(layer.norm, extra_state=False)
        post_norm = None if layer.norm_placement == "pre" else plain_norm
        # A residual of these kinds adds the norm's input. Others read its output beside the linear layer.
        read_once = layer.pre_norms and layer.residual.kind in ("sequential", "parallel")
        fused = backend.column_parallel_layer_norm_linear(layer.norm, index) if read_once else None
        # TransformerEngine's specs, too, have a module for the norm before MLA and before a MoE's router.
        alone = backend.norm(layer.norm, extra_state=True)
        general = needs_general_transformer_layer(layer)
        attention, keys = self._mixer(layer, index, fused)
        in_linear = IdentityOp if fused or not layer.pre_norms else plain_norm
        input_norm = alone if latent and layer.pre_norms else in_linear
        mlp_norm = in_linear if dense or not layer.pre_norms else alone
        return ModuleSpec(
            module=GeneralTransformerLayer if general else TransformerLayer,
            params={"layer": layer, "post_norm": post_norm} if general else {},
            submodules=TransformerLayerSubmodules(
                input_layernorm=input_norm,
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=IdentityOp if layer.residual.kind == "parallel_shared" else mlp_norm,
                mlp=self._mlp(layer.mlp, index, fused),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={**keys, **(_DENSE_KEYS if dense else {})},
            ),
        )

    def _mixer(self, layer: Layer, index: int, fused: type | None) -> tuple[ModuleSpec, dict[str, str]]:
        """The mixer's spec, and its `sharded_state_dict_keys_map`: names of norms inside LayerNormLinear.

        `fused`: class of the input projection with the layer's norm, if it has one.
        """
        mixer = layer.mixer
        if isinstance(mixer, GatedDeltaNet):
            return delta_net_spec(mixer, layer.norm, self.backend, index, fused), DELTA_NET_CHECKPOINT_KEYS
        if isinstance(mixer, LatentAttention):
            angles = self._angles_of(mixer.rotary, mixer.rotary_dim)
            return mla_spec(mixer, layer.norm, angles, self.backend, index), MLA_CHECKPOINT_KEYS
        return self._attention(mixer, layer.norm, index, fused), _ATTENTION_KEYS

    def _attention(self, attention: Attention, norm: Norm, index: int, fused: type | None) -> ModuleSpec:
        q_norm, k_norm = self.backend.qk_norms(attention, norm)
        module: type = SelfAttention
        params: dict[str, Any] = {}
        if attention.rotary and self.prefix:  # angles of the model, from its position ids
            module = Rotary2DSelfAttention if self.prefix.position_streams > 1 else SelfAttention
        elif attention.rotary:
            module, params = RotarySelfAttention, {"angles": self._angles_of(attention.rotary, attention.rotary_dim)}
        projection: Callable[..., Any] = fused or self.backend.column_parallel_linear(index)
        if attention.clip is not None:
            projection = clipped(projection, attention.clip)
        return ModuleSpec(
            module=module,
            params={"attn_mask_type": AttnMaskType.causal, **params},
            submodules=SelfAttentionSubmodules(
                linear_qkv=_linear(projection, bias=attention.bias),
                core_attention=partial(
                    self.backend.core_attention(),
                    attention=attention,
                    attention_backend=self.backend.attention_backend,
                ),
                linear_proj=_linear(self.backend.row_parallel_linear(index), bias=attention.output_bias),
                q_layernorm=q_norm,
                k_layernorm=k_norm,
            ),
        )

    def _mlp(self, mlp: MLP | MoE, index: int, fused: type | None) -> Callable[..., Any]:
        if isinstance(mlp, MoE):
            return moe_spec(mlp, self.backend, index)
        linears = MLPSubmodules(
            linear_fc1=_linear(fused or self.backend.column_parallel_linear(index), bias=mlp.bias),
            linear_fc2=_linear(self.backend.row_parallel_linear(index), bias=mlp.bias),
        )
        return partial(DenseMLP.as_mlp_submodule, submodules=linears)

    def _angles_of(self, rotary: Rotary, dim: int) -> RotaryAngles:
        """`dim`: rotary_dim."""
        key = rotary, dim
        if key not in self.angles:
            self.angles[key] = RotaryAngles(rotary, dim, self.max_position_embeddings)
        return self.angles[key]


def _linear(linear: Callable[..., Any], *, bias: bool) -> Callable[..., Any]:
    """`linear` with or without bias, whatever `add_bias_linear` says."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return linear(*args, **{**kwargs, "bias": bias})

    return build
