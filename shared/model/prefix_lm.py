"""Prefix LM (GLM): positions and segments computed from the token ids."""

from __future__ import annotations

import torch

from shared.architecture.architecture import Architecture, PrefixLM
from shared.errors import UserError
from shared.kernels.attention.masks import positions_and_starts, prefix_segments


def prefix_inputs(
    prefix: PrefixLM, ids: torch.Tensor, segments: torch.Tensor | None, labels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and segments of a prefix LM, per segment in packed rows.

    Args:
        prefix: mask and start tokens.
        ids: `[batch, sequence]`.
        segments: `[batch, sequence]`; None: one segment per row.
        labels: `[batch, sequence]`, or None.

    Returns:
        Positions and block positions `[2, batch, sequence]`; segments with prefix ends `[batch, 2, sequence]`
        (`shared.kernels.attention.masks.prefix_segments`).

    Raises:
        UserError: a segment with labels has no mask token or no start token, which the published code refuses, too. A
            segment without labels (padding) is all prefix.
    """
    batch, length = ids.shape
    place = torch.arange(length, device=ids.device).expand(batch, length)
    first = torch.zeros_like(place) if segments is None else positions_and_starts(segments)[1]

    def where(token: int) -> torch.Tensor:
        """For every position: row index of the first `token` in its segment; `length` if there is none."""
        found = torch.where(ids == token, place, length)
        return torch.full_like(place, length).scatter_reduce(1, first, found, "amin").gather(1, first)

    start, blank = where(prefix.start_token), torch.full_like(place, length)
    counts_on = torch.zeros_like(ids, dtype=torch.bool)
    for token in reversed(prefix.blank_tokens):
        own = where(token)
        chosen = own < (blank if prefix.earliest else length)
        counts_on = torch.where(chosen, token in prefix.counted_tokens, counts_on)
        blank = torch.where(chosen, own, blank)
    lacking = (start == length) | (blank == length)
    if prefix.earliest:  # the mask token must be in the prefix
        lacking |= blank > start
    if (lacking if labels is None else lacking & (labels >= 0)).any():
        raise UserError(
            f"prefix LM: a sequence has no mask token (id {' or '.join(map(str, prefix.blank_tokens))}) or no start token "
            f"(id {prefix.start_token}); end every text with both, as the model's tokenizer does"
        )
    position = torch.where((place < start) | counts_on, place, blank) - first
    block_position = (place - start + 1).clamp(min=0)
    return torch.stack((position, block_position)), prefix_segments(first, start)


def with_blank(ids: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Test ids `[batch, sequence]` with two mask tokens and a start token inserted, if the model is a prefix LM."""
    prefix = architecture.prefix
    if prefix is None:
        return ids
    first, second, start = (ids.shape[1] * eighths // 8 for eighths in (2, 3, 4))
    own = (prefix.start_token, *prefix.blank_tokens)
    plain = next(token for token in range(architecture.vocab_size) if token not in own)
    text = ids[:, :start]
    text = torch.where(torch.isin(text, torch.tensor(own, device=ids.device)), plain, text)
    ids = torch.cat([text, ids[:, start:]], 1)
    ids[:, first], ids[:, second] = prefix.blank_tokens[-1], prefix.blank_tokens[0]
    ids[:, start] = prefix.start_token
    return ids
