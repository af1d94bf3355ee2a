"""`infer chat`: a conversation in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Literal

from shared.cli import log
from shared.errors import UserError
from tools.infer.engines.engine import EngineSettings, Request, open_engine
from tools.infer.engines.sampling import Sampling
from tools.infer.environment import prepare_environment
from tools.infer.interrupts import kept_from_children, remembered
from tools.infer.prompts import check_length, encode, load_tokenizer
from tools.infer.source import open_hf_directory
from tools.infer.terminal_input import history_file, messages
from tools.infer.thinking import BEGIN, END, Part, parts

Message = dict[str, Any]
Thinking = Literal["shown", "hidden"]
Pieces = Generator[Part, None, None]
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_HELP = """\
/reset   start a new conversation
/exit    leave, as Ctrl-D does
/help    this list
Enter sends; Alt-Enter or \\ before Enter begin a new line; Ctrl-C stops a reply"""


def run(
    source: Path,
    *,
    system: str | None,
    sampling: Sampling,
    settings: EngineSettings,
    thinking: Thinking = "shown",
    arguments: dict[str, Any] | None = None,
) -> None:
    """Converse until /exit or the end of the input.

    `arguments`: further variables of the chat template.
    """
    if settings.tensor_parallel == 1:  # one conversation gains nothing from a second process
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    prepare_environment()
    model = open_hf_directory(source)
    with closing(open_engine(model, settings)) as engine:  # before the tokenizer, which may be remote code
        tokenizer = load_tokenizer(model)
        if not tokenizer.chat_template:
            raise UserError(
                f"--source {source}: its tokenizer has no chat template; `infer generate` completes raw prompts"
            )
        with kept_from_children() if sys.stdin.isatty() else nullcontext():
            engine.load()

        def reply(asked: list[Message]) -> Pieces:
            ids = encode(tokenizer, asked, "the conversation", arguments=arguments)
            check_length(ids, engine.context_length, "the conversation")
            opened = tokenizer.decode(ids[-8:]).rstrip().endswith(BEGIN)
            return parts(engine.stream(Request(prompt=ids, sampling=sampling)), thinking=opened)

        if sys.stdin.isatty() and sys.stdout.isatty():
            log("/help lists commands and keys")
            converse(messages(history_file()), reply, system, thinking)
        else:
            converse(iter(sys.stdin), reply, system, thinking)


def converse(
    lines: Iterator[str],
    reply: Callable[[list[Message]], Pieces],
    system: str | None,
    thinking: Thinking = "shown",
) -> None:
    """Answer each message on stdout.

    Args:
        lines: the user's messages; /reset, /exit and /help are commands.
        reply: conversation -> reply in pieces; UserError if the chat template or the context length rejects it.
        system: system message at the start of the conversation.
        thinking: whether the thinking of a reply is printed; it is no part of the conversation's content either way.
    """
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    conversation = list(opening)
    for line in lines:
        words = line.strip()
        if words == "/exit":
            return
        if words == "/reset":
            conversation = list(opening)
            log("new conversation")
            continue
        if words == "/help":
            log(_HELP)
            continue
        if not words:
            continue
        asked = [*conversation, {"role": "user", "content": words}]
        try:
            answer = _answer(reply(asked), thinking)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            log(f"{error}; or /reset")  # the context is full: this message is dropped from the conversation
            continue
        conversation = [*asked, answer]


def _answer(pieces: Pieces, thinking: Thinking) -> Message:
    """Print a reply as it comes. Ctrl-C on a terminal ends it; what has come stays in the conversation."""
    screen = sys.stdout.isatty()
    texts = {"answer": "", "thinking": "", "tag": ""}
    with remembered() if sys.stdin.isatty() else nullcontext(lambda: False) as stopped:
        for kind, text in pieces:
            texts[kind] += text
            if kind == "answer" or (thinking == "shown" and not screen):
                print(text, end="", flush=True)
            elif thinking == "shown" and kind == "thinking":
                print(f"{_DIM}{text}{_PLAIN}", end="", flush=True)
            elif thinking == "shown" and END in text:
                print("\n", flush=True)
            if stopped():
                pieces.close()
                break
    print(flush=True)
    answer: Message = {"role": "assistant", "content": texts["answer"]}
    return answer | ({"reasoning_content": texts["thinking"].strip()} if texts["thinking"].strip() else {})
