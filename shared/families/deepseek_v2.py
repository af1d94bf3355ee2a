"""DeepSeek V2, V2.5 and V2-Lite: latent attention; softmax scores of experts, which keep their size."""

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

_METHODS = {"greedy": False, "group_limited_greedy": True}  # whether groups of experts are chosen first


def read(fields: Fields) -> Architecture:
    """The best expert of a group stands for it."""
    common = common_fields(fields)
    fields.expect("mlp_bias", False, why="an MLP with biases beside experts is not computed here")
    fields.expect("norm_topk_prob", False, why="transformers does not divide the scores by their sum either")
    fields.expect("scoring_func", "softmax", why="computed here: softmax")
    fields.expect("topk_method", *_METHODS, why=f"computed here: {', '.join(_METHODS)}")
    grouped = _METHODS[fields.get("topk_method", str, "greedy")]
    experts = deepseek_experts(fields, common["num_layers"], dense=0, grouped=grouped, group_score_of=1)
    latent = latent_fields(fields, common["num_attention_heads"])
    return nested(family="deepseek_v2", **common | latent, experts=replace(experts, normalized=False))


def write(a: Architecture) -> dict[str, Any]:
    assert a.experts is not None
    return {
        **written_fields(a),
        **written_latent_fields(a),
        **written_deepseek_experts(a),
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if a.experts.groups > 1 else "greedy",
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, DEEPSEEK)


_EXPERTS = Experts(
    count=64,
    top_k=6,
    ffn_hidden_size=1408,
    normalized=False,
    group_score_of=1,
    shared_ffn_hidden_size=2 * 1408,
    auxiliary_loss=0.001,
    auxiliary_loss_of="sequence",
    dense_layers=(0,),
)
_V2_LITE = nested(
    family="deepseek_v2",
    num_layers=27,
    hidden_size=2048,
    ffn_hidden_size=10_944,
    num_attention_heads=16,
    num_query_groups=16,
    head_dim=192,
    vocab_size=102_400,
    max_position_embeddings=163_840,
    norm_epsilon=1e-6,
    rope_scaling=RopeScaling(kind="yarn", factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707),
    latent=LatentAttention(
        q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    experts=_EXPERTS,
    tied_embeddings=False,
)
_TINY_EXPERTS = replace(_EXPERTS, count=4, top_k=2, ffn_hidden_size=32, shared_ffn_hidden_size=64, auxiliary_loss=0.0)
_TINY = tiny(
    _V2_LITE,
    num_query_groups=4,
    head_dim=24,
    rope_scaling=RopeScaling(kind="yarn", factor=8.0, original_length=64, mscale=0.707, mscale_all_dim=0.5),
    latent=LatentAttention(q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12),
    experts=_TINY_EXPERTS,
)

FAMILY = Family(
    name="deepseek_v2",
    title="DeepSeek V2, V2.5, V2-Lite",
    hf_class="DeepseekV2ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "deepseek-v2-tiny": _TINY,
        "deepseek-v2-tiny-groups": replace(
            _TINY,
            latent=LatentAttention(
                q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12
            ),
            rope_scaling=None,
            experts=replace(_TINY_EXPERTS, count=8, top_k=4, groups=4, top_groups=2, scaling=4.0, dense_layers=()),
        ),
        "deepseek-v2-lite": _V2_LITE,
        "deepseek-v2": replace(
            _V2_LITE,
            num_layers=60,
            hidden_size=5120,
            ffn_hidden_size=12_288,
            num_attention_heads=128,
            num_query_groups=128,
            rope_scaling=RopeScaling(kind="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
            latent=LatentAttention(
                q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
            ),
            experts=replace(
                _EXPERTS,
                count=160,
                ffn_hidden_size=1536,
                groups=8,
                top_groups=3,
                shared_ffn_hidden_size=2 * 1536,
                scaling=16.0,
            ),
        ),
    },
)
