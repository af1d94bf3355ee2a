"""Eager attention, the reference: every feature, with a matrix of scores in memory.

Shapes: as in `needs`.
"""

from __future__ import annotations

import torch

from shared.kernels.attention import alibi, masks
from shared.kernels.attention.needs import Call, Carries, Features

CARRIES = Carries()


def unavailable() -> None:
    """Part of torch."""


def attend(call: Call) -> torch.Tensor:
    """As `choose.attend`."""
    q_BHQD, k_BGKD, features, segments = call.q_BHQD, call.k_BGKD, call.features, call.segments
    queries, keys, query_start = q_BHQD.shape[2], k_BGKD.shape[2], call.query_start
    rows = slice(query_start, query_start + queries)
    allowed = masks.causal(keys, q_BHQD.device) if segments is None else masks.shared_dense(segments)[..., :keys, :keys]
    index = torch.arange(keys, device=q_BHQD.device)
    if features.window is not None:
        allowed = allowed & (index[:, None] - index[None, :] < features.window)
    bias = None
    if features.slopes_H is not None:
        positions = index
        if segments is not None:
            numbers = segments if segments.ndim == 2 else segments[:, 0]
            positions = masks.segment_positions(numbers)[:, :keys]
        bias = alibi_bias(features, positions.expand(q_BHQD.shape[0], -1)[:, rows], positions)
    return masked(q_BHQD, k_BGKD, call.v_BGKV, allowed[:, :, rows], features, bias)


def alibi_bias(features: Features, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Bias of the scores, `[1 or B, H, Q, K]` fp32, of positions `[Q]` or `[B, Q]` of queries, and of keys, in their segment."""
    assert features.slopes_H is not None
    slopes = features.slopes_H.to(queries.device)
    if features.rounded_alibi is None:
        return alibi.bias(slopes, queries, keys)
    return alibi.rounded_bias(slopes, queries, keys) * features.rounded_alibi


def masked(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    allowed: torch.Tensor,
    features: Features,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`softmax([cap tanh(scale q k^T / cap) + bias | sink])[..., :K] v`, `[B, H, Q, V]`.

    Args:
        q_BHQD, k_BGKD, v_BGKV: G divides H; H / G consecutive query heads share a key/value head.
        allowed: bool (True: attend), `[1 or B, 1, Q, K]`.
        features: scale, soft cap, sinks and dropout.
        bias: added to the scores, `[1 or B, H, Q, K]`.
    """
    repeats = q_BHQD.shape[1] // k_BGKD.shape[1]
    k, v = k_BGKD.repeat_interleave(repeats, dim=1), v_BGKV.repeat_interleave(repeats, dim=1)
    scores = q_BHQD @ k.transpose(-1, -2) * features.scale_of(q_BHQD.shape[-1])
    if features.softcap is not None:
        scores = torch.tanh(scores / features.softcap) * features.softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~allowed, -torch.inf)
    if features.sinks_H is not None:
        sinks = features.sinks_H.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=exact).to(q_BHQD.dtype)[..., : k.shape[2]]
    return torch.nn.functional.dropout(weights, features.dropout) @ v
