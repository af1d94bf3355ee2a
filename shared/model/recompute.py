"""Activation recomputation: whole layers or modules of a layer. Imports neither torch nor Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from shared.architecture.architecture import MLP, Architecture, Attention, LatentAttention, MoE
from shared.errors import UserError
from shared.model.support import needs_general_transformer_layer

# Megatron-Core's `recompute_modules`, without those that need TransformerEngine (layernorm, moe_act).
Recompute = Literal["none", "selective", "full", "core_attn", "mlp", "moe", "shared_experts", "mla_up_proj"]
_ALONE = ("none", "selective", "full")


def _has(kind: type) -> Callable[[Architecture], bool]:
    return lambda architecture: any(isinstance(layer.mlp, kind) for layer in architecture.kinds)


def _plain(architecture: Architecture) -> bool:
    return not any(map(needs_general_transformer_layer, architecture.kinds))


# Module: what a model must have, in words and as a test. GeneralTransformerLayer recomputes no MLP.
_NEEDS: dict[str, tuple[tuple[str, Callable[[Architecture], bool]], ...]] = {
    "core_attn": (("attention", lambda a: isinstance(a.attention, Attention | LatentAttention)),),
    "mlp": (("dense layers", _has(MLP)), ("norms before attention and MLP, added to the residual only", _plain)),
    "moe": (("MoE layers", _has(MoE)),),
    "shared_experts": (("shared experts", lambda a: a.moe is not None and a.moe.shared is not None),),
    "mla_up_proj": (("MLA", lambda a: isinstance(a.attention, LatentAttention)),),
}


def check_recompute(chosen: tuple[Recompute, ...], architecture: Architecture) -> None:
    """UserError if the choice contradicts itself or the model."""
    if not chosen:
        raise UserError("--recompute names no module; give none for no recomputation")
    named = ",".join(chosen)
    if len(chosen) > 1 and (alone := next((each for each in chosen if each in _ALONE), None)):
        raise UserError(f"--recompute {named}: {alone} stands alone")
    for module in chosen:
        for what, holds in _NEEDS.get(module, ()):
            if not holds(architecture):
                raise UserError(f"--recompute {named}: {module} needs a model with {what}; leave {module} out")


def recompute_fields(chosen: Recompute | tuple[Recompute, ...]) -> dict[str, Any]:
    """Fields of Megatron-Core's TransformerConfig.

    full: every layer. It stores one hidden state per layer, for about a third more compute. selective is core_attn: most of the
    activation memory of long sequences, for little compute.
    """
    modules = [chosen] if isinstance(chosen, str) else list(chosen)
    if modules == ["none"]:
        return {}
    if modules == ["full"]:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = ["core_attn"] if modules == ["selective"] else modules
    return {"recompute_granularity": "selective", "recompute_modules": modules}
