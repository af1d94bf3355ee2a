"""Qwen3-Next: three layers with a gated delta net to one with gated attention; experts beside a gated shared one."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import Delta as DeltaNet
from shared.architecture.version_1 import Experts, nested
from shared.errors import UserError
from shared.families.common.decoder import common_fields, written_fields
from shared.families.common.fields import Fields
from shared.families.common.gated_delta_net import delta_fields, written_delta_fields
from shared.families.common.moe import dense_layers, expert_count, written_dense_layers
from shared.families.common.mtp import OF_QWEN
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_KINDS = ("linear_attention", "full_attention")


def read(fields: Fields) -> Architecture:
    """`layer_types` names each layer's kind; without it every `full_attention_interval`-th has attention."""
    common = common_fields(fields, rotary_fraction=0.25)
    layers = common["num_layers"]
    common["head_dim"] = fields.get("head_dim", int, 256)
    fields.expect("use_sliding_window", False, why="sliding-window attention is not computed here")
    bias = fields.get("attention_bias", bool, False)
    # The published configurations do not say that there is one; vLLM takes it for granted too.
    prediction_layers = fields.get("num_nextn_predict_layers", int, 1)
    if prediction_layers > 1:
        raise UserError(
            f"config.json: num_nextn_predict_layers {prediction_layers}: several layers behind one mtp.fc are not computed here"
        )
    kinds = _layer_kinds(fields, layers)
    experts = Experts(
        count=expert_count(fields, 512),
        top_k=fields.get("num_experts_per_tok", int, 10),
        ffn_hidden_size=fields.get("moe_intermediate_size", int, 512),
        normalized=fields.get("norm_topk_prob", bool, True),
        shared_ffn_hidden_size=fields.get("shared_expert_intermediate_size", int, 512),
        shared_gate=True,
        auxiliary_loss=fields.get("router_aux_loss_coef", float, 0.001),
        dense_layers=dense_layers(fields, layers),
    )
    return nested(
        family="qwen3_next",
        norm="rmsnorm_1p",
        qk_norm=True,
        qkv_bias=bias,
        attention_output_bias=bias,
        attention_gate=True,
        delta=delta_fields(fields, tuple(index for index, kind in enumerate(kinds) if kind == _KINDS[0])),
        experts=experts,
        prediction_layers=prediction_layers,
        **common,
    )


def _layer_kinds(fields: Fields, layers: int) -> list[str]:
    interval = fields.get("full_attention_interval", int, 4)
    every = [_KINDS[(index + 1) % interval == 0] for index in range(layers)]
    kinds: list[str] = fields.get("layer_types", list, every)
    if len(kinds) != layers or not set(kinds) <= set(_KINDS):
        raise UserError(f"config.json: layer_types must name one of {', '.join(_KINDS)} for each of {layers} layers")
    return kinds


def write(a: Architecture) -> dict[str, Any]:
    assert a.experts is not None
    assert a.delta is not None
    return {
        **written_fields(a, partial=True),
        **written_delta_fields(a.delta),
        "layer_types": [_KINDS[layer in a.attention_layers] for layer in range(a.num_layers)],
        "attention_bias": a.qkv_bias,
        "num_experts": a.experts.count,
        "num_experts_per_tok": a.experts.top_k,
        "moe_intermediate_size": a.experts.ffn_hidden_size,
        "norm_topk_prob": a.experts.normalized,
        "shared_expert_intermediate_size": a.experts.shared_ffn_hidden_size,
        "router_aux_loss_coef": a.experts.auxiliary_loss,
        **written_dense_layers(a.experts),
        "num_nextn_predict_layers": a.prediction_layers,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, Names(prediction=OF_QWEN))


_80B_A3B = nested(
    family="qwen3_next",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=5120,
    num_attention_heads=16,
    num_query_groups=2,
    head_dim=256,
    vocab_size=151_936,
    max_position_embeddings=262_144,
    norm="rmsnorm_1p",
    norm_epsilon=1e-6,
    rope_theta=10_000_000.0,
    rotary_dim=64,
    qk_norm=True,
    attention_gate=True,
    delta=DeltaNet(
        layers=tuple(layer for layer in range(48) if (layer + 1) % 4),
        key_heads=16,
        value_heads=32,
        key_head_dim=128,
        value_head_dim=128,
        conv_kernel=4,
    ),
    experts=Experts(
        count=512,
        top_k=10,
        ffn_hidden_size=512,
        shared_ffn_hidden_size=512,
        shared_gate=True,
        auxiliary_loss=0.001,
    ),
    prediction_layers=1,
    tied_embeddings=False,
)
_TINY_DELTA = DeltaNet(layers=(0,), key_heads=2, value_heads=4, key_head_dim=16, value_head_dim=12, conv_kernel=4)
_TINY_EXPERTS = Experts(count=6, top_k=3, ffn_hidden_size=32, shared_ffn_hidden_size=48, shared_gate=True)
_TINY = tiny(_80B_A3B, head_dim=32, rotary_dim=8, delta=_TINY_DELTA, experts=_TINY_EXPERTS)

FAMILY = Family(
    name="qwen3_next",
    title="Qwen3-Next",
    hf_class="Qwen3NextForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "qwen3-next-tiny": _TINY,
        "qwen3-next-tiny-mixed": replace(
            _TINY,
            num_query_groups=1,
            qkv_bias=True,
            attention_output_bias=True,
            delta=replace(_TINY_DELTA, layers=(1,), value_heads=2, conv_kernel=3),
            experts=replace(_TINY_EXPERTS, normalized=False, dense_layers=(0,)),
            prediction_layers=0,
        ),
        "qwen3-next-80b-a3b": _80B_A3B,
    },
)
