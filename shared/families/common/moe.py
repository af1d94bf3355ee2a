"""MoE of Qwen and DeepSeek: config.json fields, and which layers are MoE."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import MLP, Architecture, MoE
from shared.errors import UserError
from shared.families.common.decoder import Decoder
from shared.families.common.fields import Fields


def expert_count(fields: Fields, default: int) -> int:
    """`num_experts`; `num_local_experts` in transformers 5."""
    old, new = fields.optional("num_experts", int), fields.optional("num_local_experts", int)
    if old is not None and new is not None and old != new:
        raise UserError(f"config.json: num_experts {old} contradicts num_local_experts {new}; keep the right one")
    return old or new or default


def read_dense_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Dense layers: `mlp_only_layers`, and all except every `decoder_sparse_step`-th layer."""
    step = fields.get("decoder_sparse_step", int, 1)
    named = fields.get("mlp_only_layers", list, [])
    if step < 1:
        raise UserError(f"config.json: decoder_sparse_step is {step}; it must be at least 1")
    dense = tuple(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)
    if len(dense) == num_layers:
        raise UserError("config.json: mlp_only_layers and decoder_sparse_step leave no MoE layer")
    return dense


def read_qwen_moe(
    fields: Fields,
    decoder: Decoder,
    *,
    experts: int,
    top_k: int,
    size: int,
    normalized: bool,
    shared: int | None = None,
) -> MoE:
    """Qwen's MoE. Keyword arguments are class defaults; `shared`: size of the shared expert, None without one."""
    if shared is not None:
        shared = fields.get("shared_expert_intermediate_size", int, shared)
    return MoE(
        experts=experts,
        top_k=fields.get("num_experts_per_tok", int, top_k),
        expert=decoder.expert(fields.get("moe_intermediate_size", int, size)),
        shared=None if shared is None else decoder.expert(shared),
        shared_gate=shared is not None,
        normalized=fields.get("norm_topk_prob", bool, normalized),
        auxiliary_loss=fields.get("router_aux_loss_coef", float, 0.001),
    )


def write_qwen_moe(a: Architecture) -> dict[str, Any]:
    """Inverse of `read_qwen_moe` and `read_dense_layers`."""
    assert a.moe is not None
    return {
        "num_experts": a.moe.experts,
        "num_experts_per_tok": a.moe.top_k,
        "moe_intermediate_size": a.moe.expert.ffn_hidden_size,
        "norm_topk_prob": a.moe.normalized,
        **({"shared_expert_intermediate_size": a.moe.shared.ffn_hidden_size} if a.moe.shared else {}),
        "router_aux_loss_coef": a.moe.auxiliary_loss,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(a.layers_of(MLP)),
    }


def read_deepseek_moe(
    fields: Fields, decoder: Decoder, *, dense: int, grouped: bool, **of_the_family: Any
) -> tuple[MoE, range]:
    """DeepSeek's MoE and its dense layers."""
    fields.expect("moe_layer_freq", 1, why="every layer after the first_k_dense_replace must be MoE")
    fields.ignore("ep_size")  # expert parallelism of the authors' runs
    dense = fields.get("first_k_dense_replace", int, dense)
    if not 0 <= dense < decoder.num_layers:
        raise UserError(f"config.json: first_k_dense_replace is {dense}, which leaves no MoE layer")
    size = fields.get("moe_intermediate_size", int)
    groups, top = fields.optional("n_group", int), fields.optional("topk_group", int)
    moe = MoE(
        experts=fields.get("n_routed_experts", int),
        top_k=fields.get("num_experts_per_tok", int),
        expert=decoder.expert(size),
        shared=decoder.expert(fields.get("n_shared_experts", int) * size),
        scaling=fields.get("routed_scaling_factor", float, 1.0),
        groups=groups or 1 if grouped else 1,
        top_groups=top or 1 if grouped else 1,
        auxiliary_loss=fields.get("aux_loss_alpha", float, 0.0),
        auxiliary_loss_over="sequence" if fields.get("seq_aux", bool, True) else "batch",
        **of_the_family,
    )
    return moe, range(dense)


def write_deepseek_moe(a: Architecture) -> dict[str, Any]:
    """Inverse of `read_deepseek_moe`."""
    moe = a.moe
    assert moe is not None
    assert moe.shared is not None
    return {
        "first_k_dense_replace": len(a.layers_of(MLP)),
        "moe_layer_freq": 1,
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert.ffn_hidden_size,
        "n_shared_experts": moe.shared.ffn_hidden_size // moe.expert.ffn_hidden_size,
        "routed_scaling_factor": moe.scaling,
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
        "aux_loss_alpha": moe.auxiliary_loss,
        "seq_aux": moe.auxiliary_loss_over == "sequence",
    }
