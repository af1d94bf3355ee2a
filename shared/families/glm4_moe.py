"""GLM-4.5, 4.5-Air and 4.6: half of each head rotated, DeepSeek V3's experts and layers for further tokens."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import Experts, nested
from shared.errors import UserError
from shared.families.common.decoder import common_fields, written_fields
from shared.families.common.fields import Fields
from shared.families.common.moe import deepseek_experts, written_deepseek_experts
from shared.families.common.tensor_table import DEEPSEEK, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table


def read(fields: Fields) -> Architecture:
    """Biases are on q, k and v only. transformers 5 writes the number of further layers under another name."""
    common = common_fields(fields, default_epsilon=1e-5, rotary_fraction=0.5)
    fields.expect("norm_topk_prob", True, why="sigmoid scores that are not divided by their sum are not computed here")
    old, new = fields.optional("num_nextn_predict_layers", int), fields.optional("num_mtp_layers", int)
    if None not in (old, new) and old != new:
        raise UserError(f"config.json: num_nextn_predict_layers {old} contradicts num_mtp_layers {new}")
    further = new if old is None else old
    experts = deepseek_experts(fields, common["num_layers"], dense=1, grouped=True, group_score_of=2)
    return nested(
        family="glm4_moe",
        qk_norm=fields.get("use_qk_norm", bool, False),
        qkv_bias=fields.get("attention_bias", bool, False),
        experts=replace(experts, score="sigmoid", correction_bias=True),
        prediction_layers=1 if further is None else further,
        **common,
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **written_fields(a, partial=True),
        **written_deepseek_experts(a),
        "attention_bias": a.qkv_bias,
        "use_qk_norm": a.qk_norm,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": a.prediction_layers,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, DEEPSEEK)


_AIR = nested(
    family="glm4_moe",
    num_layers=46,
    hidden_size=4096,
    ffn_hidden_size=10_944,
    num_attention_heads=96,
    num_query_groups=8,
    head_dim=128,
    vocab_size=151_552,
    max_position_embeddings=131_072,
    norm_epsilon=1e-5,
    rope_theta=1_000_000.0,
    rotary_dim=64,
    qkv_bias=True,
    experts=Experts(
        count=128,
        top_k=8,
        ffn_hidden_size=1408,
        score="sigmoid",
        correction_bias=True,
        shared_ffn_hidden_size=1408,
        auxiliary_loss_of="sequence",
        dense_layers=(0,),
    ),
    prediction_layers=1,
    tied_embeddings=False,
)
_TINY_EXPERTS = Experts(
    count=4,
    top_k=2,
    ffn_hidden_size=32,
    score="sigmoid",
    scaling=1.5,
    correction_bias=True,
    shared_ffn_hidden_size=32,
    auxiliary_loss_of="sequence",
    dense_layers=(0,),
)
_LARGE = replace(
    _AIR,
    num_layers=92,
    hidden_size=5120,
    ffn_hidden_size=12_288,
    qk_norm=True,
    experts=Experts(
        count=160,
        top_k=8,
        ffn_hidden_size=1536,
        score="sigmoid",
        scaling=2.5,
        correction_bias=True,
        shared_ffn_hidden_size=1536,
        auxiliary_loss_of="sequence",
        dense_layers=(0, 1, 2),
    ),
)

FAMILY = Family(
    name="glm4_moe",
    title="GLM-4.5, 4.5-Air, 4.6",
    hf_class="Glm4MoeForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "glm4-moe-tiny": tiny(_LARGE, head_dim=32, rotary_dim=16, experts=_TINY_EXPERTS),
        "glm-4.5-air": _AIR,
        "glm-4.5": _LARGE,
    },
)
