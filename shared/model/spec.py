"""Which modules a layer is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import mlp as megatron_mlp
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
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
from shared.model.attention import ClippedLinear, CoreAttention, Rotary2DSelfAttention, RotarySelfAttention
from shared.model.gated_delta_net import DELTA_NET_CHECKPOINT_KEYS, delta_net_spec
from shared.model.mla import MLA_CHECKPOINT_KEYS, mla_spec
from shared.model.moe import moe_spec
from shared.model.norm import norm_of, qk_norms
from shared.model.rope import RotaryAngles, amplitude
from shared.model.transformer_layer import GeneralTransformerLayer, needs_general_layer

# Checkpoints carry TransformerEngine's names, where a norm in front of a linear layer is part of that layer.
_ATTENTION_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
# In front of experts it is a module of its own there too, for the router reads its output.
_DENSE_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def model_rotary(architecture: Architecture) -> Rotary | None:
    """The rotary embedding whose angles Megatron-Core's GPT computes once a forward pass; other layers compute their own."""
    mixers = (layer.mixer for layer in architecture.kinds)
    return next((m.rotary for m in mixers if isinstance(m, Attention | LatentAttention) and m.rotary), None)


def block_spec(architecture: Architecture, first_layer: int, num_layers: int) -> TransformerBlockSubmodules:
    """Layers from `first_layer` on and the final norm."""
    spec = _Spec(architecture)
    layers = architecture.layers[first_layer : first_layer + num_layers]
    norm = architecture.head.norm
    return TransformerBlockSubmodules(
        layer_specs=[spec.layer(layer) for layer in layers],
        layer_norm=norm_of(norm, checkpointed=True) if norm else None,
    )


def mtp_spec(architecture: Architecture) -> MultiTokenPredictionBlockSubmodules | None:
    """MTP layers; None without any."""
    mtp = architecture.mtp
    if mtp is None:
        return None
    spec = _Spec(architecture)
    norm = norm_of(mtp.layer.norm, checkpointed=True)
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            layer_norm=norm,
            eh_proj=ColumnParallelLinear,
            mtp_model_layer=spec.layer(mtp.layer),
        ),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * mtp.depth)


class _Spec:
    """Specs of one model's layers. Layers of one rotary embedding share its angles, which are computed once."""

    def __init__(self, architecture: Architecture) -> None:
        self.max_position_embeddings = architecture.max_position_embeddings
        self.rotary = model_rotary(architecture)
        self.position_streams = architecture.prefix.position_streams if architecture.prefix else 1
        self.angles: dict[Rotary, RotaryAngles] = {}

    def layer(self, layer: Layer) -> ModuleSpec:
        norm = norm_of(layer.norm, checkpointed=False) if layer.pre_norms else IdentityOp
        general = needs_general_layer(layer)
        attention, keys = self._mixer(layer)
        dense = isinstance(layer.mlp, MLP)
        return ModuleSpec(
            module=GeneralTransformerLayer if general else TransformerLayer,
            params={"layer": layer} if general else {},
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=IdentityOp if layer.residual.kind == "parallel_shared" else norm,
                mlp=_mlp(layer.mlp),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={**keys, **(_DENSE_KEYS if dense else {})},
            ),
        )

    def _mixer(self, layer: Layer) -> tuple[ModuleSpec, dict[str, str]]:
        """The mixer's spec, and how a checkpoint renames the norms that are part of its linear layers."""
        mixer = layer.mixer
        if isinstance(mixer, GatedDeltaNet):
            return delta_net_spec(mixer, layer.norm), DELTA_NET_CHECKPOINT_KEYS
        if isinstance(mixer, LatentAttention):
            return mla_spec(mixer, layer.norm, self.max_position_embeddings), MLA_CHECKPOINT_KEYS
        return self._attention(mixer, layer.norm), _ATTENTION_KEYS

    def _attention(self, attention: Attention, norm: Norm) -> ModuleSpec:
        q_norm, k_norm = qk_norms(attention, norm)
        module: type = SelfAttention
        params: dict[str, Any] = {}
        if attention.rotary and self.position_streams > 1:
            module = Rotary2DSelfAttention
        elif attention.rotary != self.rotary or amplitude(attention.rotary) != 1.0:
            module = RotarySelfAttention
            params = {"amplitude": amplitude(attention.rotary), "angles": self._own_angles(attention)}
        projection = ColumnParallelLinear if attention.clip is None else partial(ClippedLinear, limit=attention.clip)
        return ModuleSpec(
            module=module,
            params={"attn_mask_type": AttnMaskType.causal, **params},
            submodules=SelfAttentionSubmodules(
                linear_qkv=_linear(projection, bias=attention.bias),
                core_attention=partial(CoreAttention, attention=attention),
                linear_proj=_linear(RowParallelLinear, bias=attention.output_bias),
                q_layernorm=q_norm,
                k_layernorm=k_norm,
            ),
        )

    def _own_angles(self, attention: Attention) -> RotaryAngles | None:
        """None: the model's, or a layer without rotary embedding."""
        rotary = attention.rotary
        if rotary is None or rotary == self.rotary:
            return None
        if rotary not in self.angles:
            self.angles[rotary] = RotaryAngles(rotary, attention.rotary_dim, self.max_position_embeddings)
        return self.angles[rotary]


def _mlp(mlp: MLP | MoE) -> Callable[..., Any]:
    if isinstance(mlp, MoE):
        return moe_spec(mlp)
    linears = megatron_mlp.MLPSubmodules(
        linear_fc1=_linear(ColumnParallelLinear, bias=mlp.bias),
        linear_fc2=_linear(RowParallelLinear, bias=mlp.bias),
    )
    return partial(megatron_mlp.MLP.as_mlp_submodule, submodules=linears)


def _linear(linear: Callable[..., Any], *, bias: bool) -> Callable[..., Any]:
    """`linear` with its own bias: Megatron-Core has one switch for all layers."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return linear(*args, **{**kwargs, "bias": bias})

    return build
