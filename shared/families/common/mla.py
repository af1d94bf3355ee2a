"""Latent attention as DeepSeek's configurations and files have it: its fields, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.version_1 import Latent as LatentAttention
from shared.errors import UserError
from shared.families.common.fields import Fields


def latent_fields(fields: Fields, num_attention_heads: int) -> dict[str, Any]:
    """The attention of an Architecture."""
    fields.expect("attention_bias", False, why="latent attention with biases is not computed here")
    fields.expect("rope_interleave", True, why="the rotated pairs of released models are neighbours")
    latent = LatentAttention(
        q_lora_rank=fields.optional("q_lora_rank", int),
        kv_lora_rank=fields.get("kv_lora_rank", int, 512),
        qk_nope_head_dim=fields.get("qk_nope_head_dim", int, 128),
        qk_rope_head_dim=fields.get("qk_rope_head_dim", int, 64),
        v_head_dim=fields.get("v_head_dim", int, 128),
    )
    size = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    # transformers 5 writes both; its head_dim is that of the rotation.
    fields.expect("head_dim", latent.qk_rope_head_dim, why="it is qk_rope_head_dim, or absent")
    fields.expect("qk_head_dim", size, why="it is qk_nope_head_dim + qk_rope_head_dim, or absent")
    groups = fields.get("num_key_value_heads", int, num_attention_heads)
    if groups != num_attention_heads:
        raise UserError(f"config.json: num_key_value_heads {groups} is not num_attention_heads {num_attention_heads}")
    return {"latent": latent, "head_dim": size}


def written_latent_fields(a: Architecture) -> dict[str, Any]:
    """The same backwards."""
    assert a.latent is not None
    return {
        "q_lora_rank": a.latent.q_lora_rank,
        "kv_lora_rank": a.latent.kv_lora_rank,
        "qk_nope_head_dim": a.latent.qk_nope_head_dim,
        "qk_rope_head_dim": a.latent.qk_rope_head_dim,
        "v_head_dim": a.latent.v_head_dim,
        "head_dim": a.latent.qk_rope_head_dim,
        "attention_bias": False,
    }


def latent_norms(latent: LatentAttention) -> Iterator[tuple[str, str, int]]:
    """Megatron-Core's key, Hugging Face's name and the size of each norm; the key holds it as part of what follows."""
    if latent.q_lora_rank:
        yield "linear_q_up_proj.layer_norm_", "self_attn.q_a_layernorm", latent.q_lora_rank
    yield "linear_kv_up_proj.layer_norm_", "self_attn.kv_a_layernorm", latent.kv_lora_rank


def latent_projections(a: Architecture, latent: LatentAttention) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Key, name and shape of each projection but the output's. Both sides order rows alike:

    a head's queries `[nope, rope]`, keys and values `[nope, value]`, the low rank's `[latent, rope]`.
    """
    hidden, rank = a.hidden_size, latent.kv_lora_rank
    if low := latent.q_lora_rank:
        yield "linear_q_down_proj", "self_attn.q_a_proj", (low, hidden)
        yield "linear_q_up_proj", "self_attn.q_b_proj", (a.q_size, low)
    else:
        yield "linear_q_proj", "self_attn.q_proj", (a.q_size, hidden)
    yield "linear_kv_down_proj", "self_attn.kv_a_proj_with_mqa", (rank + latent.qk_rope_head_dim, hidden)
    values = a.num_attention_heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    yield "linear_kv_up_proj", "self_attn.kv_b_proj", (values, rank)
