"""Which modules a layer is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from shared.architecture.architecture import Architecture
from shared.model.attention import ClippedLinear, CoreAttention, RotatedSelfAttention, StreamedSelfAttention
from shared.model.gated_delta_net import DELTA_CHECKPOINT_KEYS, delta_net
from shared.model.mla import LATENT_CHECKPOINT_KEYS, latent_attention
from shared.model.moe import experts_of
from shared.model.norm import head_norms, norm_of
from shared.model.rope import Rotation
from shared.model.transformer_layer import JoinedLayer, has_own_layer

# Checkpoints carry TransformerEngine's names, where a norm in front of a linear layer is a part of that layer.
_ATTENTION_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
# In front of experts it is a module of its own there too, for the router reads what it makes.
_DENSE_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def block_spec(architecture: Architecture, first_layer: int, num_layers: int) -> TransformerBlockSubmodules:
    """Layers from `first_layer` on and the final norm, from Megatron-Core's own modules, our norms and attention."""
    layers = range(first_layer, first_layer + num_layers)
    # One for all of them, so that its angles are computed once.
    windowed = Rotation(architecture, windowed=True) if architecture.window_rope_theta is not None else None
    return TransformerBlockSubmodules(
        layer_specs=[_layer(architecture, layer, windowed if architecture.window(layer) else None) for layer in layers],
        layer_norm=norm_of(architecture, checkpointed=True) if architecture.final_norm else None,
    )


def prediction_spec(architecture: Architecture) -> MultiTokenPredictionBlockSubmodules | None:
    """Layers for tokens further ahead, each around a decoder layer as the model's are; None without any."""
    if not architecture.prediction_layers:
        return None
    norm = norm_of(architecture, checkpointed=True)
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            layer_norm=norm,
            eh_proj=ColumnParallelLinear,
            mtp_model_layer=_layer(architecture.prediction_layer, 0, None),
        ),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * architecture.prediction_layers)


def _layer(architecture: Architecture, layer: int, rotation: Rotation | None) -> ModuleSpec:
    norm = norm_of(architecture, checkpointed=False) if architecture.norms_in_front else IdentityOp
    own, sparse = has_own_layer(architecture), layer in architecture.moe_layers
    experts = architecture.experts if sparse else None
    delta = architecture.delta if layer not in architecture.attention_layers else None
    keys = LATENT_CHECKPOINT_KEYS if architecture.latent else DELTA_CHECKPOINT_KEYS if delta else _ATTENTION_KEYS
    return ModuleSpec(
        module=JoinedLayer if own else TransformerLayer,
        params={"architecture": architecture} if own else {},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=delta_net(architecture, delta) if delta else _attention(architecture, rotation),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if architecture.residual == "parallel_shared" else norm,
            mlp=experts_of(experts) if experts else partial(MLP.as_mlp_submodule, submodules=_mlp(architecture)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={**keys, **({} if sparse else _DENSE_KEYS)},
        ),
    )


def _mlp(architecture: Architecture) -> MLPSubmodules:
    return MLPSubmodules(
        linear_fc1=_linear(ColumnParallelLinear, bias=architecture.mlp_bias),
        linear_fc2=_linear(RowParallelLinear, bias=architecture.mlp_bias),
    )


def _attention(architecture: Architecture, rotation: Rotation | None) -> ModuleSpec:
    if architecture.latent:
        return latent_attention(architecture, architecture.latent)
    q_norm, k_norm = head_norms(architecture)
    # Angles of a layer's own are not stretched.
    amplitude = architecture.rope_scaling.amplitude if architecture.rope_scaling and not rotation else 1.0
    own = {"amplitude": amplitude, "rotation": rotation} if amplitude != 1.0 or rotation else {}
    limit = architecture.qkv_clip
    projection = ColumnParallelLinear if limit is None else partial(ClippedLinear, limit=limit)
    streamed = architecture.position_streams > 1 and architecture.positions == "rope"
    return ModuleSpec(
        module=RotatedSelfAttention if own else StreamedSelfAttention if streamed else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, **own},
        submodules=SelfAttentionSubmodules(
            linear_qkv=_linear(projection, bias=architecture.qkv_bias),
            core_attention=partial(CoreAttention, architecture=architecture),
            linear_proj=_linear(RowParallelLinear, bias=architecture.attention_output_bias),
            q_layernorm=q_norm,
            k_layernorm=k_norm,
        ),
    )


def _linear(linear: Callable[..., Any], *, bias: bool) -> Callable[..., Any]:
    """`linear` with the bias the architecture gives it: Megatron-Core has one switch for all layers."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return linear(*args, **{**kwargs, "bias": bias})

    return build
