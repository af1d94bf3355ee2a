"""Attention masks from segments (packed sequences, prefix LM).

Shapes: B batch, S sequence. A dense mask `[B, 1, S, S]` is bool, True where query (axis 2) attends to key (axis 3). The
model passes `segments` instead:

- `[B, S]` integers: causal attention within each run of equal numbers (`segments.within_segments`, without a mask). Padding
  is segment 0.
- `[B, 2, S]` integers: prefix LM (`prefix_segments`); core attention makes the dense mask.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary


def segment_positions(segments: torch.Tensor) -> torch.Tensor:
    """Position of each token in its segment, from 0, `[B, S]` int64."""
    return positions_and_starts(segments)[0]


def positions_and_starts(segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Position of each token in its segment, from 0, and row index of the segment's first token; `[B, S]` int64 each."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = torch.where(begins, index, 0).cummax(1).values
    return index - starts, starts


def prefix_segments(starts: torch.Tensor, prefix_ends: torch.Tensor) -> torch.Tensor:
    """Prefix LM segments `[B, 2, S]`, stacked from two tensors `[B, S]`.

    Args:
        starts: row index of the segment's first token; serves as segment number.
        prefix_ends: row index of the first token behind the segment's prefix: all tokens of the segment attend to keys
            before it.
    """
    return torch.stack((starts, prefix_ends), 1)


def causal(keys: int, device: torch.device, queries: int | None = None) -> torch.Tensor:
    """Causal mask of the last `queries` of `keys` positions (None: of all), `[1, 1, queries, keys]`."""
    return window(keys, keys, device, queries)


def window(keys: int, size: int, device: torch.device, queries: int | None = None) -> torch.Tensor:
    """Causal mask with a sliding window of `size` keys, of the last `queries` positions, `[1, 1, queries, keys]`."""
    queries = keys if queries is None else queries
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)
    return allowed.triu_(keys - queries + 1 - size)[None, None]


def dense(segments: torch.Tensor) -> torch.Tensor:
    """Dense mask `[B, 1, S, S]` of segments `[B, S]` or `[B, 2, S]`."""
    if segments.ndim == 2:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        return same.tril_()
    numbers, prefix_ends = segments.unbind(1)
    index = torch.arange(segments.shape[-1], device=segments.device)
    same = numbers[:, :, None] == numbers[:, None, :]
    allowed = (index[:, None] >= index[None, :]) | (index[None, None, :] < prefix_ends[:, :, None])
    return (same & allowed)[:, None]


_dense: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def shared_dense(segments: torch.Tensor) -> torch.Tensor:
    """`dense(segments)`, cached by the segments tensor.

    All layers of a micro batch get the same segments tensor, so the mask is built and kept by autograd once.
    """
    if segments not in _dense:
        _dense[segments] = dense(segments)
    mask: torch.Tensor = _dense[segments]
    return mask
