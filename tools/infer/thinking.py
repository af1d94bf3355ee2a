"""The thinking of a reply, `<think>...</think>`, told apart from its answer while it streams."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Literal, NamedTuple

BEGIN, END = "<think>", "</think>"  # of Qwen 3, DeepSeek R1, GLM 4.5, SmolLM 3 and others


class Part(NamedTuple):
    """A piece of a reply."""

    kind: Literal["tag", "thinking", "answer"]
    text: str


def parts(pieces: Iterable[str], *, thinking: bool) -> Generator[Part, None, None]:
    """The pieces of a reply, cut at its tags. The texts together are the reply.

    A reply thinks at its beginning only; tags later in it are part of the answer. A text that may become a tag waits for
    what follows.

    Args:
        pieces: of the reply, as they come.
        thinking: whether the prompt ends with the opening tag, as that of DeepSeek R1 does.
    """
    state: Literal["before", "thinking", "after", "answer"] = "thinking" if thinking else "before"
    waiting = ""
    for piece in pieces:
        if state == "answer":
            yield Part("answer", piece)
            continue
        waiting += piece
        if state == "before":
            blank = len(waiting) - len(waiting.lstrip())
            if BEGIN.startswith(waiting[blank : blank + len(BEGIN)]) and len(waiting) < blank + len(BEGIN):
                continue
            if waiting.startswith(BEGIN, blank):
                yield Part("tag", waiting[: blank + len(BEGIN)])
                state, waiting = "thinking", waiting[blank + len(BEGIN) :]
            else:
                yield Part("answer", waiting)
                state, waiting = "answer", ""
                continue
        if state == "thinking":
            before, tag, after = waiting.partition(END)
            if tag:
                if before:
                    yield Part("thinking", before)
                yield Part("tag", tag)
                state, waiting = "after", after
        if state == "after":  # line breaks belong to the tag
            if blank := len(waiting) - len(waiting.lstrip("\n")):
                yield Part("tag", waiting[:blank])
            if waiting := waiting[blank:]:
                yield Part("answer", waiting)
                state, waiting = "answer", ""
            continue
        kept = next((n for n in range(len(END) - 1, 0, -1) if waiting.endswith(END[:n])), 0)
        if shown := waiting[: len(waiting) - kept]:
            yield Part("thinking", shown)
        waiting = waiting[len(waiting) - kept :]
    if waiting:
        yield Part("thinking" if state == "thinking" else "answer", waiting)
