"""Replies of the model in training to a few prompts, token by token without a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

_MULTIPLE = 64  # sequences are padded to it: fewer shapes, and a length that tensor parallel ranks share evenly


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """An input of the model."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model says to a prompt, in the update that `Replies` asked in."""

    prompt: str
    text: str
    tokens: int  # with the token that ends it
    ended: bool  # by an end token, not by the limit


@dataclass(frozen=True, kw_only=True)
class Replies:
    """Which prompts are answered, and when."""

    prompts: tuple[Prompt, ...]
    every: int  # updates; also before the first and after the last
    limit: int  # tokens of a reply, at most
    ends: frozenset[int]  # tokens that end a reply
    decode: Callable[[Sequence[int]], str]

    def due(self, step: int, *, finished: bool) -> bool:
        """Whether the prompts are answered after update `step`."""
        return finished or step % self.every == 0


def greedy(model: Sequence[DistributedDataParallel], replies: Replies) -> list[Reply]:
    """The likeliest next token of each, until an end token, the limit or the model's context. Collective.

    Every rank goes the way of rank 0: differences in the last bit between data-parallel ranks do not part them.
    """
    import torch

    from shared.model.logits import logits
    from shared.training.optimizer import gather_weights

    gather_weights(list(model))
    chunks = [chunk.module for chunk in model]
    context = chunks[0].architecture.max_position_embeddings
    device = next(chunks[0].parameters()).device
    said: list[list[int]] = [[] for _ in replies.prompts]
    while open_ := [place for place in range(len(said)) if _goes_on(place, said, replies, context)]:
        rows = [[*replies.prompts[place].ids, *said[place]] for place in open_]
        longest = min(-(-max(map(len, rows)) // _MULTIPLE) * _MULTIPLE, context)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        chosen = logits(chunks, ids)[torch.arange(len(rows), device=device), last].argmax(-1)
        torch.distributed.broadcast(chosen, src=0)
        for place, token in zip(open_, chosen.tolist(), strict=True):
            said[place].append(token)
    made = []
    for prompt, tokens in zip(replies.prompts, said, strict=True):
        ended = tokens[-1] in replies.ends
        text = replies.decode(tokens[:-1] if ended else tokens)
        made.append(Reply(prompt=prompt.text, text=text, tokens=len(tokens), ended=ended))
    return made


def _goes_on(place: int, said: Sequence[Sequence[int]], replies: Replies, context: int) -> bool:
    own = said[place]
    ended = bool(own) and own[-1] in replies.ends
    return not ended and len(own) < replies.limit and len(replies.prompts[place].ids) + len(own) < context
