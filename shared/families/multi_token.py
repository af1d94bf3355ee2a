"""Layers that predict tokens further ahead (multi-token prediction): DeepSeek V3's, GLM-4.5's, Qwen3-Next's.

They do not change the model's own answer. Megatron-Core keeps such layers inside a model of its own kind, which is not
built here: their tensors stay beside the weights, as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from shared.families.latent import latent_norms, latent_projections
from shared.mapping.rule import Aside
from shared.model.architecture import Architecture

_SHARED = ("embed_tokens", "shared_head.head")  # copies of the model's own, which some files leave out
_OWN = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
_LAYER = ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.gate")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_MLP = ("gate_proj", "up_proj", "down_proj")


def multi_token_asides(a: Architecture) -> Iterator[Aside]:
    """Names of the tensors of layers `num_layers` and on, each a whole decoder layer with experts."""
    if not a.prediction_layers:
        return
    layers = tuple(range(a.num_layers, a.num_layers + a.prediction_layers))
    modules, biases = [*_OWN, *_LAYER, *(f"mlp.shared_experts.{name}" for name in _MLP)], []
    if a.latent:
        modules += [name for _, name, _ in latent_norms(a.latent)]
        modules += [name for _, name, _ in latent_projections(a, a.latent)]
    else:
        modules += [*_QKV, *(_QK_NORMS if a.qk_norm else ())]
        biases = [f"{name}.bias" for name in _QKV if a.qkv_bias]
    for name in (*(f"{module}.weight" for module in modules), *biases, "mlp.gate.e_score_correction_bias"):
        yield Aside(name=f"model.layers.{{layer}}.{name}", layers=layers, complete=True)
    for name in _SHARED:
        yield Aside(name=f"model.layers.{{layer}}.{name}.weight", layers=layers)
    for name in _MLP:
        path = f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}.weight"
        yield Aside(name=path, axes=("layer", "expert"), layers=layers, complete=True)


def mtp_asides(a: Architecture) -> Iterator[Aside]:
    """Qwen's: under names of their own, counted from 0, each a whole layer with attention and experts."""
    if not a.prediction_layers:
        return
    layers = tuple(range(a.prediction_layers))
    for name in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield Aside(name=f"mtp.{name}.weight", axes=(), complete=True)
    modules = [*_LAYER, *_QKV, *_QK_NORMS]
    modules += ["mlp.shared_expert_gate", *(f"mlp.shared_expert.{name}" for name in _MLP)]
    for name in modules:
        yield Aside(name=f"mtp.layers.{{layer}}.{name}.weight", layers=layers, complete=True)
    if a.qkv_bias:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield Aside(name=f"mtp.layers.{{layer}}.self_attn.{name}.bias", layers=layers, complete=True)
    for name in _MLP:
        path = f"mtp.layers.{{layer}}.mlp.experts.{{expert}}.{name}.weight"
        yield Aside(name=path, axes=("layer", "expert"), layers=layers, complete=True)
