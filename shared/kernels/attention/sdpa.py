"""Attention by torch's scaled_dot_product_attention.

Shapes: B batch, H query heads, G key/value heads, S sequence, D head_dim, V value head_dim.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from shared.kernels.attention import masks


def attend(
    q_BHSD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSV: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`softmax(scale q k^T + mask) v`, `[B, H, S, V]`.

    Args:
        q_BHSD, k_BGSD, v_BGSV: G divides H; H / G consecutive query heads share a key/value head.
        mask: bool (True: attend) or additive bias, `[1 or B, 1 or H, S, keys]`; None: causal, queries are the last of the
            keys.
        scale: softmax scale; None: `1 / sqrt(D)`.
        dropout: attention dropout probability.
    """
    queries, keys = q_BHSD.shape[2], k_BGSD.shape[2]
    if mask is None and queries != keys:  # `is_causal` aligns the first query with the first key
        mask = masks.causal(keys, q_BHSD.device, queries)
    return scaled_dot_product_attention(
        q_BHSD,
        k_BGSD,
        v_BGSV,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q_BHSD.shape[1] != k_BGSD.shape[1],
    )
