"""Prefix LM with a blank (GLM): positions and segments, which follow from the tokens."""

from __future__ import annotations

import torch

from shared.architecture.architecture import Architecture, PrefixLM
from shared.errors import UserError
from shared.kernels.attention.masks import positions_and_starts, prefix_segments


def prefix_inputs(
    prefix: PrefixLM, ids: torch.Tensor, segments: torch.Tensor | None, labels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and segments of rows; of every segment by itself where rows are packed.

    Args:
        prefix: which tokens mean what.
        ids: `[batch, sequence]`.
        segments: `[batch, sequence]`, or None for rows of one segment.
        labels: `[batch, sequence]`, or None.

    Returns:
        First and second positions, `[2, batch, sequence]`, and segments with the ends of their prefixes,
        `[batch, 2, sequence]` (`shared.kernels.attention.masks.prefix_segments`).

    Raises:
        UserError: a segment has no blank or no start, as the published code refuses it; one without any label of
            its own (padding) is let through, and sees all of itself.
    """
    batch, length = ids.shape
    place = torch.arange(length, device=ids.device).expand(batch, length)
    first = torch.zeros_like(place) if segments is None else positions_and_starts(segments)[1]

    def where(token: int) -> torch.Tensor:
        """Of every position, the first place of the token in its segment; `length` where there is none."""
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
    if prefix.earliest:  # which is looked for in the text alone
        lacking |= blank > start
    if (lacking if labels is None else lacking & (labels >= 0)).any():
        raise UserError(
            f"a row of tokens has no blank (one of {', '.join(map(str, prefix.blank_tokens))}) or no start of what fills "
            f"it ({prefix.start_token}); end every text with both, as the model's tokenizer does"
        )
    text = torch.where((place < start) | counts_on, place, blank) - first
    filling = (place - start + 1).clamp(min=0)
    return torch.stack((text, filling)), prefix_segments(first, start)


def with_blank(ids: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Any tokens `[batch, sequence]`, as rows that the architecture can read: blanks of two kinds and a start are put in."""
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
