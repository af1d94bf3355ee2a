"""`infer chat`: a conversation in the terminal, in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import log
from shared.errors import UserError
from tools.infer.engine import check_supported, complete, model_config, open_source, start
from tools.infer.prompts import check_length, encode, load_tokenizer
from tools.infer.settings import engine_arguments, prepare_environment

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

Message = dict[str, Any]


def run(
    source: Path,
    *,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    max_model_len: int | None,
    precision: str | None,
    tensor_parallel: int,
) -> None:
    """Converse until /exit or the end of the input."""
    prepare_environment()
    model = open_source(source)
    check_supported(model)
    tokenizer = load_tokenizer(model)
    if not tokenizer.chat_template:
        raise UserError(
            f"--source {source}: its tokenizer has no chat template; `infer generate` completes raw prompts"
        )
    arguments = engine_arguments(
        model,
        precision=precision,
        max_model_len=max_model_len,
        tensor_parallel=tensor_parallel,
        batch_size=1,
        seed=seed,
    )
    context = model_config(arguments).max_model_len
    llm = start(arguments)
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)

    def reply(messages: list[Message]) -> Iterator[str]:
        ids = encode(tokenizer, messages, "the conversation")
        check_length(ids, context, "the conversation")
        return _stream(llm, ids, sampling)

    if sys.stdin.isatty():
        log("/reset forgets the conversation, /exit leaves")
    converse(_lines(), reply, system)


def converse(lines: Iterator[str], reply: Callable[[list[Message]], Iterator[str]], system: str | None) -> None:
    """Answer each line on stdout.

    Args:
        lines: what the user types; /reset and /exit are commands.
        reply: messages so far -> pieces of the answer as they come. UserError if it cannot be answered.
        system: message that opens the conversation.
    """
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    for line in lines:
        words = line.strip()
        if words == "/exit":
            return
        if words == "/reset":
            messages = list(opening)
            log("forgotten")
            continue
        if not words:
            continue
        asked = [*messages, {"role": "user", "content": words}]
        pieces = []
        try:
            for piece in reply(asked):
                print(piece, end="", flush=True)
                pieces.append(piece)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            log(f"{error}; or /reset")  # the conversation outgrew the context: what was asked is taken back
            continue
        print(flush=True)
        messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def _lines() -> Iterator[str]:
    """Lines of a terminal with editing and history, or of a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 -- its import gives input() editing and history

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _stream(llm: LLM, ids: list[int], sampling: SamplingParams) -> Iterator[str]:
    """Pieces of the completion as they come."""
    shown = 0
    for output in complete(llm, {"reply": (ids, sampling)}):
        text = output.outputs[0].text
        stable = (
            text if output.finished else text.rstrip("\N{REPLACEMENT CHARACTER}")
        )  # the rest of a character is to come
        yield stable[shown:]
        shown = max(shown, len(stable))
