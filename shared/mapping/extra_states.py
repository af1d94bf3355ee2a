"""Names of what TransformerEngine's modules keep beside their weights.

Megatron-Core asks for these objects when its layers are TransformerEngine's, and passes over them otherwise. For a
model without FP8 state each is None. Pure data, importable without torch or Megatron-Core.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from shared.architecture.architecture import Architecture

_ATTENTION = ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm")
_LATENT = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")
_DIRECT_QUERIES = ("linear_q_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")
_DELTA = ("in_proj", "out_norm", "out_proj")
_DENSE = ("mlp.linear_fc1", "mlp.linear_fc2")
_SPARSE = ("pre_mlp_layernorm", "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
_EXPERT = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


def extra_states(architecture: Architecture) -> Iterator[str]:
    """Keys of a torch_dist checkpoint: `decoder.layers.MODULE._extra_state/shard_LAYER_LAYERS` where layers are stacked."""
    yield from _of_layers(architecture)
    if architecture.final_norm:
        yield "decoder.final_layernorm._extra_state/shard_0_1"
    for layer in range(architecture.prediction_layers):
        prefix = f"mtp.layers.{layer}"
        for module in ("enorm", "hnorm", "eh_proj", "final_layernorm"):
            yield f"{prefix}.{module}._extra_state/{_shard([], [])}"
        yield from _of_layer(architecture.prediction_layer, 0, f"{prefix}.transformer_layer", [], [])


def _of_layers(architecture: Architecture) -> Iterator[str]:
    layers = architecture.num_layers
    for layer in range(layers):
        if architecture.homogeneous:
            yield from _of_layer(architecture, layer, "decoder.layers", [layer], [layers])
        else:
            yield from _of_layer(architecture, layer, f"decoder.layers.{layer}", [], [])


def _of_layer(a: Architecture, layer: int, prefix: str, index: list[int], sizes: list[int]) -> Iterator[str]:
    sparse = layer in a.moe_layers
    for module in _attention(a, layer) + list(_SPARSE if sparse else _DENSE):
        yield f"{prefix}.{module}._extra_state/{_shard(index, sizes)}"
    if sparse and a.experts:
        for module, expert in product(_EXPERT, range(a.experts.count)):
            yield f"{prefix}.{module}._extra_state/{_shard([*index, expert], [*sizes, a.experts.count])}"


def _attention(architecture: Architecture, layer: int) -> list[str]:
    if layer not in architecture.attention_layers:
        return [f"self_attention.{module}" for module in _DELTA]
    if architecture.latent is None:
        return [f"self_attention.{module}" for module in _ATTENTION]
    projections = _LATENT if architecture.latent.q_lora_rank else _DIRECT_QUERIES
    return ["input_layernorm", *(f"self_attention.{module}" for module in (*projections, "core_attention"))]


def _shard(index: list[int], sizes: list[int]) -> str:
    if not index:
        return "shard_0_1"
    return f"shard_{'.'.join(map(str, index))}_{'.'.join(map(str, sizes))}"
