"""DeepSeek V3, V3.1, R1, Moonlight and Kimi K2: latent attention; sigmoid scores, and a bias that counts for choosing only."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, RopeScaling
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import Experts, nested
from shared.architecture.version_1 import Latent as LatentAttention
from shared.families.common.decoder import common_fields, written_fields
from shared.families.common.fields import Fields
from shared.families.common.mla import latent_fields, written_latent_fields
from shared.families.common.moe import deepseek_experts, written_deepseek_experts
from shared.families.common.tensor_table import DEEPSEEK, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table


def read(fields: Fields) -> Architecture:
    """The two best experts of a group stand for it."""
    common = common_fields(fields)
    fields.expect("scoring_func", "sigmoid", why="computed here: sigmoid")
    fields.expect("topk_method", "noaux_tc", why="computed here: noaux_tc")
    fields.expect("norm_topk_prob", True, why="sigmoid scores that are not divided by their sum are not computed here")
    experts = deepseek_experts(fields, common["num_layers"], dense=3, grouped=True, group_score_of=2)
    latent = latent_fields(fields, common["num_attention_heads"])
    return nested(
        family="deepseek_v3",
        **common | latent,
        experts=replace(experts, score="sigmoid", correction_bias=True),
        prediction_layers=fields.get("num_nextn_predict_layers", int, 0),
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **written_fields(a),
        **written_latent_fields(a),
        **written_deepseek_experts(a),
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "num_nextn_predict_layers": a.prediction_layers,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, DEEPSEEK)


_LATENT = LatentAttention(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
_EXPERTS = Experts(
    count=256,
    top_k=8,
    ffn_hidden_size=2048,
    score="sigmoid",
    scaling=2.5,
    correction_bias=True,
    groups=8,
    top_groups=4,
    shared_ffn_hidden_size=2048,
    auxiliary_loss_of="sequence",
    dense_layers=(0, 1, 2),
)
_V3 = nested(
    family="deepseek_v3",
    num_layers=61,
    hidden_size=7168,
    ffn_hidden_size=18_432,
    num_attention_heads=128,
    num_query_groups=128,
    head_dim=192,
    vocab_size=129_280,
    max_position_embeddings=163_840,
    norm_epsilon=1e-6,
    rope_scaling=RopeScaling(kind="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
    latent=_LATENT,
    experts=_EXPERTS,
    prediction_layers=1,
    tied_embeddings=False,
)
_TINY_LATENT = LatentAttention(q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
_TINY = tiny(
    _V3,
    num_query_groups=4,
    head_dim=24,
    rope_scaling=RopeScaling(kind="yarn", factor=8.0, original_length=64, mscale=1.0, mscale_all_dim=1.0),
    latent=_TINY_LATENT,
    experts=replace(
        _EXPERTS,
        count=8,
        top_k=4,
        groups=4,
        top_groups=2,
        ffn_hidden_size=32,
        shared_ffn_hidden_size=32,
        dense_layers=(0,),
    ),
)
_MOONLIGHT_EXPERTS = Experts(
    count=64,
    top_k=6,
    ffn_hidden_size=1408,
    score="sigmoid",
    scaling=2.446,
    correction_bias=True,
    shared_ffn_hidden_size=2 * 1408,
    auxiliary_loss=0.001,
    auxiliary_loss_of="sequence",
    dense_layers=(0,),
)
_MOONLIGHT = replace(
    _V3,
    num_layers=27,
    hidden_size=2048,
    ffn_hidden_size=11_264,
    num_attention_heads=16,
    num_query_groups=16,
    vocab_size=163_840,
    max_position_embeddings=8192,
    norm_epsilon=1e-5,
    rope_theta=50_000.0,
    rope_scaling=None,
    latent=replace(_LATENT, q_lora_rank=None),
    experts=_MOONLIGHT_EXPERTS,
    prediction_layers=0,
)
FAMILY = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3", "kimi_k2"),  # Kimi K2's modelling code is DeepSeek V3's
    title="DeepSeek V3, V3.1, R1, Moonlight, Kimi K2",
    hf_class="DeepseekV3ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "deepseek-v3-tiny": _TINY,
        "moonlight-tiny": tiny(
            _MOONLIGHT,
            num_query_groups=4,
            head_dim=24,
            norm_epsilon=0.1,  # that of the norms within attention is another
            latent=replace(_TINY_LATENT, q_lora_rank=None),
            experts=replace(
                _MOONLIGHT_EXPERTS,
                count=4,
                top_k=2,
                ffn_hidden_size=32,
                shared_ffn_hidden_size=64,
                auxiliary_loss=0.0,
                dense_layers=(),
            ),
        ),
        "deepseek-v3": _V3,
        "moonlight-16b-a3b": _MOONLIGHT,
        "kimi-k2": replace(
            _V3,
            num_attention_heads=64,
            num_query_groups=64,
            vocab_size=163_840,
            max_position_embeddings=131_072,
            rope_theta=50_000.0,
            rope_scaling=RopeScaling(
                kind="yarn", factor=32.0, original_length=4096, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0
            ),
            experts=replace(
                _EXPERTS,
                count=384,
                scaling=2.827,
                groups=1,
                top_groups=1,
                auxiliary_loss=0.001,
                dense_layers=(0,),
            ),
            prediction_layers=0,
        ),
    },
)
