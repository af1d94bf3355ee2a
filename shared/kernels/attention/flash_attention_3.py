"""Attention by flash-attn 3 (module `flash_attn_interface`, of the package `flash_attn_3`). Hopper.

Shapes: as in `variable_length`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from shared.kernels.attention.needs import FLASH, Call, cannot_import
from shared.kernels.attention.variable_length import pack
from shared.kernels.attention.varlen import flash_window

CARRIES = replace(
    FLASH,
    lacks={
        "prefix LM": "not causal",
        "ALiBi": "no slopes",
        "rounded ALiBi": "no slopes",
        "dropout": "no such argument",
        "sinks": "its backward pass takes no log-sum-exp from outside in every release",
    },
    capability=(9, 0),
    below=(10, 0),
)


def unavailable() -> str | None:
    """Why the module cannot be used; None if it can."""
    return cannot_import("flash_attn_interface")


def attend(call: Call) -> torch.Tensor:
    """As `choose.attend`."""
    from flash_attn_interface import flash_attn_varlen_func

    packed = pack(call)
    out = flash_attn_varlen_func(
        packed.q_THW,
        packed.k_TGW,
        packed.v_TGW,
        cu_seqlens_q=packed.lengths.queries_N1,
        cu_seqlens_k=packed.lengths.keys_N1,
        max_seqlen_q=packed.lengths.longest_queries,
        max_seqlen_k=packed.lengths.longest_keys,
        softmax_scale=call.scale,
        causal=True,
        window_size=flash_window(call.features.window),
        softcap=call.features.softcap or 0.0,
    )
    return packed.unpack(out[0] if isinstance(out, tuple) else out)  # first releases return the log-sum-exp, too
