"""Which keys a query attends to.

Shapes: B batch, S sequence. A dense mask `[B, 1, S, S]` is bool, True where the query (third axis) attends to the key
(fourth); it is made within an attention product only. What travels is `segments`, either

- `[B, S]` integers: positions of a row with the same number attend to each other causally. A segment is a run of equal
  numbers; padding is a segment like any other (number 0), so that every position attends to itself. Or
- `[B, 2, S]` integers of a prefix LM (`prefix_segments`).
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary


def segment_positions(segments: torch.Tensor) -> torch.Tensor:
    """Tokens since the first of the segment, `[B, S]` int64."""
    return positions_and_starts(segments)[0]


def positions_and_starts(segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens since the first of the segment, and the index of that first token in the row, `[B, S]` int64 each."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = torch.where(begins, index, 0).cummax(1).values
    return index - starts, starts


def prefix_segments(starts: torch.Tensor, prefix_ends: torch.Tensor) -> torch.Tensor:
    """Segments of a prefix LM: `[B, 2, S]` of `[B, S]` each.

    Args:
        starts: the index in the row of the segment's first token: the segment's number.
        prefix_ends: the index in the row of the first token behind the segment's prefix. Keys in front of it are
            attended to by the whole segment.
    """
    return torch.stack((starts, prefix_ends), 1)


def causal(length: int, device: torch.device) -> torch.Tensor:
    """`[1, 1, S, S]`."""
    return window(length, length, device)


def window(length: int, size: int, device: torch.device) -> torch.Tensor:
    """Causal, the last `size` keys only, `[1, 1, S, S]`."""
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return allowed.triu_(1 - size)[None, None]


def dense(segments: torch.Tensor) -> torch.Tensor:
    """`[B, 1, S, S]` of segments in either form."""
    if segments.ndim == 2:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        return same.tril_()
    numbers, prefix_ends = segments.unbind(1)
    index = torch.arange(segments.shape[-1], device=segments.device)
    same = numbers[:, :, None] == numbers[:, None, :]
    allowed = (index[:, None] >= index[None, :]) | (index[None, None, :] < prefix_ends[:, :, None])
    return (same & allowed)[:, None]


_dense: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def shared_dense(segments: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """`dense(segments)`, with a window of `size` keys: made once for all layers of a micro batch.

    Layers are handed the same tensor of segments, and autograd keeps one mask for all of them.
    """
    made = _dense.setdefault(segments, {})
    if size not in made:
        length = segments.shape[-1]
        made[size] = dense(segments) if size is None else window(length, size, segments.device) & dense(segments)
    mask: torch.Tensor = made[size]
    return mask
