"""How many experts, and in which layers, as Qwen's configurations say it."""

from __future__ import annotations

from typing import Any

from shared.errors import UserError
from shared.families.fields import Fields
from shared.model.architecture import Experts


def expert_count(fields: Fields, default: int) -> int:
    """`num_experts`, which transformers 5 writes as `num_local_experts`."""
    old, new = fields.optional("num_experts", int), fields.optional("num_local_experts", int)
    if old is not None and new is not None and old != new:
        raise UserError(f"config.json: num_experts {old} contradicts num_local_experts {new}; keep the right one")
    return old or new or default


def dense_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Layers with an ordinary MLP: those of `mlp_only_layers`, and all but every `decoder_sparse_step`-th."""
    step = fields.get("decoder_sparse_step", int, 1)
    named = fields.get("mlp_only_layers", list, [])
    if step < 1:
        raise UserError(f"config.json: decoder_sparse_step is {step}; at least 1 is possible")
    dense = tuple(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)
    if len(dense) == num_layers:
        raise UserError("config.json: mlp_only_layers and decoder_sparse_step leave no layer with experts")
    return dense


def written_dense_layers(experts: Experts) -> dict[str, Any]:
    """The same backwards."""
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(experts.dense_layers)}
