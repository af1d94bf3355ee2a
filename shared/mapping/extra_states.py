"""Keys of TransformerEngine's `_extra_state` in a torch_dist checkpoint.

Megatron-Core requires them with TransformerEngine layers and ignores them with local ones. Without FP8 each is None.
Pure data, importable without torch or Megatron-Core.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from shared.architecture.architecture import Architecture, GatedDeltaNet, LatentAttention, Layer, MoE
from shared.architecture.layer import Mixer

_ATTENTION = ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm")
_MLA = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")
_MLA_DIRECT_QUERIES = ("linear_q_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")
_DELTA_NET = ("in_proj", "out_norm", "out_proj")
_MLP = ("mlp.linear_fc1", "mlp.linear_fc2")
_MOE = ("pre_mlp_layernorm", "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
_EXPERT = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


def extra_states(architecture: Architecture) -> Iterator[str]:
    """Keys; with stacked layers `decoder.layers.MODULE._extra_state/shard_LAYER_LAYERS`."""
    count = architecture.num_layers
    for index, layer in enumerate(architecture.layers):
        if architecture.homogeneous:
            yield from _of_layer(layer, "decoder.layers", [index], [count])
        else:
            yield from _of_layer(layer, f"decoder.layers.{index}", [], [])
    if architecture.head.norm:
        yield "decoder.final_layernorm._extra_state/shard_0_1"
    if mtp := architecture.mtp:
        for index in range(mtp.depth):
            prefix = f"mtp.layers.{index}"
            for module in ("enorm", "hnorm", "eh_proj", "final_layernorm"):
                yield f"{prefix}.{module}._extra_state/{_shard([], [])}"
            yield from _of_layer(mtp.layer, f"{prefix}.transformer_layer", [], [])


def _of_layer(layer: Layer, prefix: str, index: list[int], sizes: list[int]) -> Iterator[str]:
    moe = layer.mlp if isinstance(layer.mlp, MoE) else None
    for module in _mixer(layer.mixer) + list(_MOE if moe else _MLP):
        yield f"{prefix}.{module}._extra_state/{_shard(index, sizes)}"
    if moe:
        for module, expert in product(_EXPERT, range(moe.experts)):
            yield f"{prefix}.{module}._extra_state/{_shard([*index, expert], [*sizes, moe.experts])}"


def _mixer(mixer: Mixer) -> list[str]:
    if isinstance(mixer, GatedDeltaNet):
        return [f"self_attention.{module}" for module in _DELTA_NET]
    if not isinstance(mixer, LatentAttention):
        return [f"self_attention.{module}" for module in _ATTENTION]
    projections = _MLA if mixer.q_lora_rank else _MLA_DIRECT_QUERIES
    return ["input_layernorm", *(f"self_attention.{module}" for module in (*projections, "core_attention"))]


def _shard(index: list[int], sizes: list[int]) -> str:
    if not index:
        return "shard_0_1"
    return f"shard_{'.'.join(map(str, index))}_{'.'.join(map(str, sizes))}"
