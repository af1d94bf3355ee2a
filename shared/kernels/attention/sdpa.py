"""Attention by torch's scaled_dot_product_attention.

Shapes: as in `needs`.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from shared.kernels.attention import masks
from shared.kernels.attention.needs import HALF, Call, Carries

_MASK = "would take a mask of [sequence, sequence]"
CARRIES = Carries(
    lacks={
        "packed rows": _MASK,
        "window": _MASK,
        "ALiBi": _MASK,
        "rounded ALiBi": _MASK,
        "soft cap": "no such argument",
        "sinks": "no such argument",
        "later queries": "query 0 is key 0",
    }
)
_FLASH_HEAD_DIM = 256


def unavailable() -> None:
    """Part of torch."""


def attend(call: Call) -> torch.Tensor:
    """As `choose.attend`. A prefix LM has a dense mask: no kernel has prefixes."""
    keys = call.k_BGKD.shape[2]
    mask = None if call.segments is None else masks.shared_dense(call.segments)[..., :keys, :keys]
    scale, dropout = call.features.scale, call.features.dropout
    return masked(call.q_BHQD, call.k_BGKD, call.v_BGKV, mask, scale=scale, dropout=dropout)


def masked(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`softmax(scale q k^T + mask) v`, `[B, H, Q, V]`.

    Args:
        q_BHQD, k_BGKD, v_BGKV: G divides H; H / G consecutive query heads share a key/value head.
        mask: bool (True: attend) or additive bias, `[1 or B, 1 or H, Q, K]`; None: causal, Q = K.
        scale: softmax scale; None: `1 / sqrt(D)`.
        dropout: attention dropout probability.
    """
    grouped = q_BHQD.shape[1] != k_BGKD.shape[1]
    if grouped and not takes_groups(q_BHQD.device.type, q_BHQD.dtype, mask, q_BHQD.shape[3], v_BGKV.shape[3]):
        repeats = q_BHQD.shape[1] // k_BGKD.shape[1]
        k_BGKD, v_BGKV = (x.repeat_interleave(repeats, dim=1) for x in (k_BGKD, v_BGKV))
        grouped = False
    return scaled_dot_product_attention(
        q_BHQD,
        k_BGKD,
        v_BGKV,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=grouped,
    )


def takes_groups(device: str, dtype: torch.dtype, mask: torch.Tensor | None, head_dim: int, value_dim: int) -> bool:
    """Whether a fused kernel takes grouped queries. On CUDA only the flash kernel does: elsewhere torch would silently take
    the math kernel, with all scores in memory; repeated keys and values are small beside them."""
    if device != "cuda":
        return True
    return mask is None and dtype in HALF and head_dim == value_dim <= _FLASH_HEAD_DIM
