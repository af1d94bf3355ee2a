"""Architectures that can be converted but not trained: combinations that `shared.model` does not implement.

Imports neither torch nor Megatron-Core, so commands can check before they write anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from shared.architecture.architecture import (
    MLP,
    Architecture,
    Attention,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    MoE,
    Norm,
)
from shared.errors import UserError


def check_supported(architecture: Architecture, *, fix: str = "") -> None:
    """Raise UserError, ending in `fix`, if training and logits are not supported."""
    if found := unsupported(architecture):
        raise UserError(
            f"{architecture.family}: {', '.join(found)}: supported in conversion, not in training and logits"
            + (f"; {fix}" if fix else "")
        )


def unsupported(architecture: Architecture) -> list[str]:
    """Unsupported combinations, as noun phrases; empty if the model can be trained."""
    if not any(isinstance(layer.mixer, Attention | LatentAttention) for layer in architecture.kinds):
        return ["a model without attention"]
    found = [
        *_layers(architecture),
        *_positions(architecture),
        *_embedding_and_head(architecture),
        *_prefix(architecture),
        *_mtp(architecture),
    ]
    for layer in (*architecture.kinds, *((architecture.mtp.layer,) if architecture.mtp else ())):
        found += _layer(layer, bool(architecture.mtp))
    return list(dict.fromkeys(found))


def _layers(a: Architecture) -> Iterator[str]:
    """Unsupported differences between layers."""
    mixers = [layer.mixer for layer in a.kinds]
    if len({type(mixer) for mixer in mixers if not isinstance(mixer, GatedDeltaNet)}) > 1:
        yield "MLA beside other attention"
    if any(isinstance(m, LatentAttention) for m in mixers) and any(isinstance(m, GatedDeltaNet) for m in mixers):
        yield "MLA beside gated delta nets"
    for kind, name in ((Attention, "attention"), (LatentAttention, "MLA"), (GatedDeltaNet, "gated delta nets")):
        values = [
            _global_fields(mixer) if isinstance(mixer, Attention) else mixer
            for mixer in mixers
            if isinstance(mixer, kind)
        ]
        yield from _differences(name, values)
    yield from _differences("MLPs", [layer.mlp for layer in a.kinds if isinstance(layer.mlp, MLP)])
    yield from _differences("MoE", [layer.mlp for layer in a.kinds if isinstance(layer.mlp, MoE)])
    yield from _differences("norms", [layer.norm for layer in a.kinds])
    yield from _differences("residuals", [layer.residual for layer in a.kinds])
    if len({layer.norm_placement for layer in a.kinds}) > 1:
        yield "layers with different norm placements"
    rotaries = [m.rotary for m in mixers if isinstance(m, Attention) and m.rotary]
    if len({rotary.interleaved for rotary in rotaries}) > 1:
        yield "layers with rotary pairs interleaved and half a head apart"
    experts = [layer.mlp.expert for layer in a.kinds if isinstance(layer.mlp, MoE)]
    dense = [layer.mlp for layer in a.kinds if isinstance(layer.mlp, MLP)]
    if experts and dense and _activation(dense[0]) != _activation(experts[0]):
        yield "MoE with an activation other than the dense layers'"
    if experts and any(mlp.bias for mlp in dense):
        yield "MoE beside dense layers with MLP biases"


def _global_fields(attention: Attention) -> Attention:
    """The attention without the fields that may differ between layers.

    All other fields are global in TransformerConfig, or change the shapes of tensors that a checkpoint stacks.
    """
    return replace(attention, window=None, rotary=None)


def _differences(name: str, values: list[Any]) -> Iterator[str]:
    if len(set(values)) > 1:
        first = values[0]
        differing = [f.name for f in fields(first) if len({getattr(value, f.name) for value in values}) > 1]
        yield f"{name} with different {', '.join(differing)} in different layers"


def _activation(mlp: MLP) -> tuple[Any, ...]:
    return mlp.activation, mlp.clamp, mlp.up_offset


def _positions(a: Architecture) -> Iterator[str]:
    attention = [layer.mixer for layer in a.kinds if isinstance(layer.mixer, Attention | LatentAttention)]
    if a.embedding.positions:
        if any(m.rotary for m in attention):
            yield "learned positions with rotary embedding"
        if any(isinstance(m, Attention) and m.alibi for m in attention):
            yield "learned positions with ALiBi"


def _embedding_and_head(a: Architecture) -> Iterator[str]:
    embedding, head = a.embedding, a.head
    if embedding.factorised_size is not None and (embedding.norm or embedding.multiplier != 1.0):
        yield "a factorised embedding with a norm or a multiplier"
    if head.bias and head.tied:
        yield "an output layer with a bias and tied embeddings"
    if head.normalized and head.tied:
        yield "NormHead with tied embeddings"
    for norm in (embedding.norm, head.norm):
        if norm:
            yield from _norm(norm)


def _norm(norm: Norm) -> Iterator[str]:
    if norm.kind == "rmsnorm" and norm.bias:
        yield "RMSNorm with a bias"
    if norm.kind == "layernorm" and norm.zero_centered_gamma:
        yield "LayerNorm with zero-centred gamma"
    if not norm.affine and not norm.bias:
        yield "norms without weights, other than LayerNorm with a bias"


def _layer(layer: Layer, mtp: bool) -> Iterator[str]:
    residual, placement, mixer = layer.residual, layer.norm_placement, layer.mixer
    yield from _norm(layer.norm)
    if residual.input_multiplier != 1.0 and residual.kind not in ("sequential", "normed"):
        yield f"an input multiplier of a {residual.kind} residual"
    if residual.kind != "sequential" and placement != "pre":
        yield f"a {residual.kind} residual with norm placement {placement}"
    plain = (residual.kind, placement) == ("sequential", "pre")
    if isinstance(mixer, GatedDeltaNet) and not plain:
        yield "gated delta nets with a residual other than sequential or norms other than pre"
    if isinstance(mixer, LatentAttention):
        yield from _mla(mixer, layer, plain)
    if isinstance(mixer, Attention):
        yield from _attention(mixer, layer.norm, mtp)
    if isinstance(layer.mlp, MoE):
        yield from _moe(layer.mlp)
        if residual.kind == "parallel_shared":
            yield "MoE with a parallel_shared residual"


def _mla(mla: LatentAttention, layer: Layer, plain: bool) -> Iterator[str]:
    if not plain:
        yield "MLA with a residual other than sequential or norms other than pre"
    if layer.norm.kind != "rmsnorm" or layer.norm.zero_centered_gamma:
        yield "MLA with norms other than RMSNorm"
    if mla.scale is not None:
        yield "MLA with a softmax scale of its own"
    if mla.rotary.interleaved:
        yield "MLA with interleaved rotary pairs in the checkpoint"


def _attention(attention: Attention, norm: Norm, mtp: bool) -> Iterator[str]:
    alibi = attention.alibi
    if alibi and attention.rotary:
        yield "ALiBi with rotary embedding"
    if attention.clip is not None and attention.gate:
        yield "clipped queries, keys and values with an output gate"
    if alibi and attention.window is not None:
        yield "ALiBi with a sliding window"
    if alibi and attention.softcap is not None:
        yield "ALiBi with a soft cap"
    if alibi and attention.sinks:
        yield "ALiBi with attention sinks"
    if alibi and alibi.rounded and alibi.bias_max != 8:
        yield "ALiBi rounded to bf16 with a bias_max other than 8"
    if attention.scale_by_layer and mtp:
        yield "softmax scale / layer number with MTP"
    if attention.scale_by_layer and alibi and alibi.rounded:
        yield "softmax scale / layer number with ALiBi rounded to bf16"
    if attention.qk_norm and not norm.affine:
        yield "QK norm without weights"
    if attention.qk_norm == "each_head" and norm.kind != "layernorm":
        yield "QK norm with a weight for each head, other than LayerNorm"
    if attention.qk_norm == "projection" and (norm.kind != "rmsnorm" or norm.zero_centered_gamma):
        yield "QK norm over the whole projection, other than RMSNorm"


def _moe(moe: MoE) -> Iterator[str]:
    expert, shared = moe.expert, moe.shared
    if not expert.gated:
        yield "MoE without gated experts"
    if expert.bias != moe.router_bias:
        yield f"MoE with a bias in the {'experts' if expert.bias else 'router'} but not in the other"
    if expert.bias and moe.groups > 1:
        yield "MoE with expert biases and expert groups"
    if expert.bias and shared:
        yield "MoE with expert biases and shared experts"
    if shared and shared.bias:
        yield "MoE with biases in the shared experts"
    if shared and _activation(shared) != _activation(expert):
        yield "MoE with an activation of the shared experts other than the experts'"
    if moe.score == "sigmoid" and not moe.normalized:
        yield "MoE with sigmoid scores that are not normalised"
    if moe.score == "softmax" and moe.correction_bias:
        yield "MoE with softmax scores and a correction bias"


def _prefix(a: Architecture) -> Iterator[str]:
    prefix = a.prefix
    if prefix is None:
        return
    mixers = [layer.mixer for layer in a.kinds]
    if any(isinstance(m, LatentAttention) for m in mixers):
        yield "prefix LM with MLA"
    if any(isinstance(m, GatedDeltaNet) for m in mixers):
        yield "prefix LM with gated delta nets"
    if a.mtp:
        yield "prefix LM with MTP"
    positions, attention = a.embedding.positions, [m for m in mixers if isinstance(m, Attention)]
    if any(m.alibi for m in attention):
        yield "prefix LM with ALiBi"
    if any(m.window is not None for m in attention):
        yield "prefix LM with a sliding window"
    if positions and prefix.position_streams == 1:
        yield "prefix LM with one table of learned positions"
    if positions and positions.offset:
        yield "prefix LM with an offset of learned positions"
    rotaries = {m.rotary for m in attention}
    if len(rotaries) > 1:
        yield "prefix LM with rotary embedding that differs between layers"
    for rotary in rotaries - {None}:
        assert rotary
        if rotary.scaling:
            yield "prefix LM with rotary scaling"
        if rotary.dim is not None or rotary.interleaved:
            yield "prefix LM with partial or interleaved rotary embedding"
        if any(m.head_dim % (2 * prefix.position_streams) for m in attention):
            yield f"prefix LM with {prefix.position_streams} rotations of an odd part of a head"


def _mtp(a: Architecture) -> Iterator[str]:
    if a.mtp is None:
        return
    layer = a.mtp.layer
    if isinstance(layer.mixer, GatedDeltaNet):
        yield "MTP with a gated delta net"
        return
    if _mixer(layer) not in {_mixer(kind) for kind in a.kinds}:
        yield "MTP with attention unlike the model's"
    if layer.mlp not in {kind.mlp for kind in a.kinds}:
        yield "MTP with an MLP or MoE unlike the model's"
    if (layer.norm, layer.norm_placement, layer.residual) not in {
        (kind.norm, kind.norm_placement, kind.residual) for kind in a.kinds
    }:
        yield "MTP with norms or a residual unlike the model's"


def _mixer(layer: Layer) -> Any:
    return _global_fields(layer.mixer) if isinstance(layer.mixer, Attention) else layer.mixer


def needs_general_transformer_layer(layer: Layer) -> bool:
    """Whether Megatron-Core's TransformerLayer cannot compute `layer`, and `GeneralTransformerLayer` does."""
    plain = (layer.residual.kind, layer.norm_placement) == ("sequential", "pre")
    return not plain or (layer.residual.multiplier, layer.residual.input_multiplier) != (1.0, 1.0)
