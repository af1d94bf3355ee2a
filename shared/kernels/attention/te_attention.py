"""Attention by TransformerEngine's DotProductAttention, which picks a kernel of cuDNN or flash-attn. CUDA.

Shapes: as in `variable_length`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from shared.kernels.attention.needs import FLASH, Call, cannot_import
from shared.kernels.attention.variable_length import pack
from shared.kernels.attention.varlen import flash_window

CARRIES = replace(
    FLASH,
    lacks={
        "prefix LM": "not causal",
        "ALiBi": "not for packed tokens in every kernel",
        "rounded ALiBi": "slopes only",
        "soft cap": "no such argument",
        "sinks": "a parameter of its own module",
    },
)


def unavailable() -> str | None:
    """Why the package cannot be used; None if it can."""
    return cannot_import("transformer_engine.pytorch")


def attend(call: Call) -> torch.Tensor:
    """As `choose.attend`."""
    packed = pack(call)
    lengths = packed.lengths
    _, heads, width = packed.q_THW.shape
    module = _module(heads, call.k_BGKD.shape[1], width, call.scale, call.features.dropout)
    out = module(
        *(packed.q_THW.contiguous(), packed.k_TGW.contiguous(), packed.v_TGW.contiguous()),
        qkv_format="thd",
        # The other mask type, with queries at the first keys, has fewer kernels where keys go on before the queries.
        attn_mask_type="padding_causal" if lengths.square else "padding_causal_bottom_right",
        window_size=flash_window(call.features.window),
        cu_seqlens_q=lengths.queries_N1,
        cu_seqlens_kv=lengths.keys_N1,
        max_seqlen_q=lengths.longest_queries,
        max_seqlen_kv=lengths.longest_keys,
    )
    return packed.unpack(out.view(-1, heads, width))


@cache
def _module(heads: int, groups: int, width: int, scale: float, dropout: float) -> Any:
    """The module of these sizes; it has no parameters."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        num_attention_heads=heads,
        kv_channels=width,
        num_gqa_groups=groups,
        attention_dropout=dropout,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scale,
    )
