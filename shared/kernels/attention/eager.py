"""Eager attention, for soft cap and sinks, which torch's scaled_dot_product_attention lacks.

Shapes: as in `sdpa`.
"""

from __future__ import annotations

import torch

from shared.kernels.attention import masks


def attend(
    q_BHSD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSV: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    scale: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`softmax([cap tanh(scale q k^T / cap) | sink])[..., :S] v`, `[B, H, S, V]`.

    Args:
        q_BHSD, k_BGSD, v_BGSV, scale, dropout: as in `sdpa.attend`.
        mask: bool (True: attend), `[1 or B, 1, S, keys]`; None: causal, queries are the last of the keys.
        softcap: `cap` (Gemma 2); None: no soft cap.
        sinks_H: attention sinks, one extra logit per head without a value (gpt-oss).
    """
    repeats = q_BHSD.shape[1] // k_BGSD.shape[1]
    k, v = k_BGSD.repeat_interleave(repeats, dim=1), v_BGSV.repeat_interleave(repeats, dim=1)
    scale = q_BHSD.shape[-1] ** -0.5 if scale is None else scale
    scores = q_BHSD @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    allowed = masks.causal(k.shape[2], q_BHSD.device, q_BHSD.shape[2]) if mask is None else mask
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks_H is not None:
        sinks = sinks_H.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q_BHSD.dtype)[..., : k.shape[2]]
    return torch.nn.functional.dropout(weights, dropout) @ v
