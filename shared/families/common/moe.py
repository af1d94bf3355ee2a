"""How many experts, and in which layers, as Qwen's and DeepSeek's configurations say it."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.version_1 import Experts
from shared.errors import UserError
from shared.families.common.fields import Fields


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


def deepseek_experts(fields: Fields, num_layers: int, *, dense: int, grouped: bool, group_score_of: int) -> Experts:
    """DeepSeek's fields; the default number of dense layers is the class's. The scores are the family's to say."""
    fields.expect("moe_layer_freq", 1, why="layers with experts follow each other in released models")
    fields.ignore("ep_size")  # how the authors ran it
    dense = fields.get("first_k_dense_replace", int, dense)
    if not 0 <= dense < num_layers:
        raise UserError(f"config.json: first_k_dense_replace is {dense}, which leaves no layer with experts")
    size = fields.get("moe_intermediate_size", int)
    groups, top = fields.optional("n_group", int), fields.optional("topk_group", int)
    return Experts(
        count=fields.get("n_routed_experts", int),
        top_k=fields.get("num_experts_per_tok", int),
        ffn_hidden_size=size,
        scaling=fields.get("routed_scaling_factor", float, 1.0),
        groups=groups or 1 if grouped else 1,
        top_groups=top or 1 if grouped else 1,
        group_score_of=group_score_of,
        shared_ffn_hidden_size=fields.get("n_shared_experts", int) * size,
        auxiliary_loss=fields.get("aux_loss_alpha", float, 0.0),
        auxiliary_loss_of="sequence" if fields.get("seq_aux", bool, True) else "batch",
        dense_layers=tuple(range(dense)),
    )


def written_deepseek_experts(a: Architecture) -> dict[str, Any]:
    """The same backwards."""
    experts = a.experts
    assert experts is not None
    assert experts.shared_ffn_hidden_size is not None
    return {
        "first_k_dense_replace": len(experts.dense_layers),
        "moe_layer_freq": 1,
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "n_shared_experts": experts.shared_ffn_hidden_size // experts.ffn_hidden_size,
        "routed_scaling_factor": experts.scaling,
        "n_group": experts.groups,
        "topk_group": experts.top_groups,
        "aux_loss_alpha": experts.auxiliary_loss,
        "seq_aux": experts.auxiliary_loss_of == "sequence",
    }
