"""`infer chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from shared.cli import log
from shared.errors import UserError
from tools.infer.engines.engine import EngineSettings, Request, open_engine
from tools.infer.engines.sampling import Sampling
from tools.infer.environment import prepare_environment
from tools.infer.prompts import check_length, encode, load_tokenizer
from tools.infer.source import open_hf_directory

Message = dict[str, Any]


def run(source: Path, *, system: str | None, sampling: Sampling, settings: EngineSettings) -> None:
    """Converse until /exit or the end of the input."""
    prepare_environment()
    model = open_hf_directory(source)
    with closing(open_engine(model, settings)) as engine:  # before the tokenizer, which may be remote code
        tokenizer = load_tokenizer(model)
        if not tokenizer.chat_template:
            raise UserError(
                f"--source {source}: its tokenizer has no chat template; `infer generate` completes raw prompts"
            )
        engine.load()

        def reply(messages: list[Message]) -> Iterator[str]:
            ids = encode(tokenizer, messages, "the conversation")
            check_length(ids, engine.context_length, "the conversation")
            return engine.stream(Request(prompt=ids, sampling=sampling))

        if sys.stdin.isatty():
            log("/reset starts a new conversation, /exit leaves")
        converse(_lines(), reply, system)


def converse(lines: Iterator[str], reply: Callable[[list[Message]], Iterator[str]], system: str | None) -> None:
    """Answer each line on stdout.

    Args:
        lines: the user's input; /reset and /exit are commands.
        reply: conversation -> reply in pieces; UserError if the chat template or the context length rejects it.
        system: system message at the start of the conversation.
    """
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    for line in lines:
        words = line.strip()
        if words == "/exit":
            return
        if words == "/reset":
            messages = list(opening)
            log("new conversation")
            continue
        if not words:
            continue
        asked = [*messages, {"role": "user", "content": words}]
        answer = []
        try:
            for piece in reply(asked):
                print(piece, end="", flush=True)
                answer.append(piece)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            log(f"{error}; or /reset")  # the context is full: this line is dropped from the conversation
            continue
        print(flush=True)
        messages = [*asked, {"role": "assistant", "content": "".join(answer)}]


def _lines() -> Iterator[str]:
    """Lines from a terminal (with editing and history) or from a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 -- its import gives input() editing and history

    while True:
        try:
            yield input("> ")
        except EOFError:
            return
