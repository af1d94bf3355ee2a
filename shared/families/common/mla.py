"""MLA of DeepSeek V2 and V3: config.json fields and tensor names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.architecture.architecture import Architecture, LatentAttention, Rotary
from shared.errors import UserError
from shared.families.common.fields import Fields


def read_mla(fields: Fields, heads: int, rotary: Rotary) -> LatentAttention:
    """The MLA of config.json."""
    fields.expect("attention_bias", False, why="MLA with biases is not supported")
    fields.expect("rope_interleave", True, why="only interleaved RoPE pairs are supported with MLA")
    mla = LatentAttention(
        heads=heads,
        q_lora_rank=fields.optional("q_lora_rank", int),
        kv_lora_rank=fields.get("kv_lora_rank", int, 512),
        qk_nope_head_dim=fields.get("qk_nope_head_dim", int, 128),
        qk_rope_head_dim=fields.get("qk_rope_head_dim", int, 64),
        v_head_dim=fields.get("v_head_dim", int, 128),
        rotary=rotary,
        dropout=fields.get("attention_dropout", float, 0.0),
    )
    # transformers 5 writes both; its head_dim is qk_rope_head_dim.
    fields.expect("head_dim", mla.qk_rope_head_dim, why="it must equal qk_rope_head_dim, or be absent")
    fields.expect("qk_head_dim", mla.head_dim, why="it must equal qk_nope_head_dim + qk_rope_head_dim, or be absent")
    groups = fields.get("num_key_value_heads", int, heads)
    if groups != heads:
        raise UserError(f"config.json: MLA: num_key_value_heads {groups} must equal num_attention_heads {heads}")
    return mla


def write_mla(a: Architecture) -> dict[str, Any]:
    """Inverse of `read_mla`."""
    mla = a.mla
    assert mla is not None
    return {
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "head_dim": mla.qk_rope_head_dim,
        "attention_bias": False,
    }


def mla_norms(mla: LatentAttention) -> Iterator[tuple[str, str, int]]:
    """Megatron key (part of a LayerNormLinear), Hugging Face name and size of each low-rank norm."""
    if mla.q_lora_rank:
        yield "linear_q_up_proj.layer_norm_", "self_attn.q_a_layernorm", mla.q_lora_rank
    yield "linear_kv_up_proj.layer_norm_", "self_attn.kv_a_layernorm", mla.kv_lora_rank


def mla_projections(hidden: int, mla: LatentAttention) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Megatron key, Hugging Face name and shape of each projection except o_proj.

    Row order is equal on both sides: q `[nope, rope]` and kv_up `[k_nope, v]` per head, kv_down `[latent, k_rope]`.
    """
    if low := mla.q_lora_rank:
        yield "linear_q_down_proj", "self_attn.q_a_proj", (low, hidden)
        yield "linear_q_up_proj", "self_attn.q_b_proj", (mla.q_size, low)
    else:
        yield "linear_q_proj", "self_attn.q_proj", (mla.q_size, hidden)
    yield "linear_kv_down_proj", "self_attn.kv_a_proj_with_mqa", (mla.kv_lora_rank + mla.qk_rope_head_dim, hidden)
    values = mla.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield "linear_kv_up_proj", "self_attn.kv_b_proj", (values, mla.kv_lora_rank)
