"""Qwen3-Next: of 4 layers, 3 gated delta nets and 1 gated attention; MoE with a gated shared expert; MTP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.families.common.decoder import attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.gated_delta_net import read_gated_delta_net, write_gated_delta_net
from shared.families.common.moe import expert_count, read_dense_layers, read_qwen_moe, write_qwen_moe
from shared.families.common.mtp import QWEN3_NEXT_MTP
from shared.families.common.tensor_table import Names
from shared.families.family import TINY, Family

_KINDS = ("linear_attention", "full_attention")


def read(fields: Fields) -> Architecture:
    """Without `layer_types`, every `full_attention_interval`-th layer has attention."""
    decoder = read_decoder(fields, rotary_fraction=0.25, default_head_dim=256)
    fields.expect("use_sliding_window", False, why="sliding-window attention is not supported for this family")
    bias = fields.get("attention_bias", bool, False)
    # Published config.json files do not declare the MTP layer; vLLM assumes one, too.
    mtp = fields.get("num_nextn_predict_layers", int, 1)
    if mtp > 1:
        raise UserError(f"config.json: num_nextn_predict_layers = {mtp} is not supported: mtp.fc allows one MTP layer")
    kinds = _layer_kinds(fields, decoder.num_layers)
    net = read_gated_delta_net(fields)
    return decoder.build(
        "qwen3_next",
        norm={"zero_centered_gamma": True},
        attention={"qk_norm": "head", "gate": True, "bias": bias, "output_bias": bias},
        moe=read_qwen_moe(
            fields, decoder, experts=expert_count(fields, 512), top_k=10, size=512, shared=512, normalized=True
        ),
        dense_layers=read_dense_layers(fields, decoder.num_layers),
        vary=lambda index, layer: replace(layer, mixer=net) if kinds[index] == _KINDS[0] else layer,
        mtp=mtp,
    )


def _layer_kinds(fields: Fields, layers: int) -> list[str]:
    interval = fields.get("full_attention_interval", int, 4)
    every = [_KINDS[(index + 1) % interval == 0] for index in range(layers)]
    kinds: list[str] = fields.get("layer_types", list, every)
    if len(kinds) != layers or not set(kinds) <= set(_KINDS):
        raise UserError(f"config.json: layer_types must name one of {', '.join(_KINDS)} for each of {layers} layers")
    return kinds


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a, partial=True),
        **write_gated_delta_net(a),
        "layer_types": [_KINDS[layer.mixer != a.delta_net] for layer in a.layers],
        "attention_bias": attention_of(a).bias,
        **write_qwen_moe(a),
        "num_nextn_predict_layers": a.mtp.depth if a.mtp else 0,
    }


_QWEN3_NEXT_80B_A3B = {
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "vocab_size": 151_936,
    "max_position_embeddings": 262_144,
    "rope_theta": 10_000_000.0,
}
_QWEN3_NEXT_TINY = {
    **_QWEN3_NEXT_80B_A3B,
    **TINY,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "router_aux_loss_coef": 0.0,
}

FAMILY = Family(
    name="qwen3_next",
    title="Qwen3-Next",
    hf_class="Qwen3NextForCausalLM",
    read=read,
    names=Names(mtp=QWEN3_NEXT_MTP),
    write=write,
    size_configs={
        "qwen3-next-tiny": _QWEN3_NEXT_TINY,
        "qwen3-next-tiny-mixed": {
            **_QWEN3_NEXT_TINY,
            "num_key_value_heads": 1,
            "linear_num_value_heads": 2,
            "linear_conv_kernel_dim": 3,
            "layer_types": ["full_attention", "linear_attention"],
            "attention_bias": True,
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
            "num_nextn_predict_layers": 0,
        },
        "qwen3-next-80b-a3b": _QWEN3_NEXT_80B_A3B,
    },
)
