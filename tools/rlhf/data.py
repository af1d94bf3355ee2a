"""Reads and tokenises prompts and preference pairs. Dropped rows are counted; errors have file and line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.data.chat_template import render_prompt
from shared.data.messages import Message, tool_definitions
from shared.data.sources import Row, rows_of
from shared.errors import UserError
from tools.rlhf.preferences import Reply, messages, preference

_RESERVED = ("prompts", "completions")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line of `--prompts`."""

    text: str
    """The model's input; for messages, the chat template's output with the generation prompt."""
    ids: tuple[int, ...]
    raw: str | list[dict[str, Any]] = ""
    """The row's value: text or messages."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns: arguments of reward functions."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference: two token sequences of prompt, reply and end-of-sequence token."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def read_prompts(path: Path, tokenizer: Any, *, context_length: int, max_new_tokens: int) -> list[Prompt]:
    """Prompts of a file with `{"prompt": text or messages}` or `{"messages": [...]}` rows.

    Args:
        path: a file of rows, or a folder of them.
        tokenizer: a fast tokenizer of transformers.
        context_length: the model's, in tokens.
        max_new_tokens: tokens of the context reserved for the reply.

    Raises:
        UserError: a row is invalid or too long; the message has file and line.
    """
    prompts = []
    for row in rows_of(path, flag="--prompts"):
        key = "prompt" if "prompt" in row.value else "messages"
        if {"prompt", "messages"} <= row.value.keys():
            raise row.error("both 'prompt' and 'messages'; leave one out or rename it")
        if key not in row.value:
            raise row.error(f"no column 'prompt' or 'messages' (the row has: {', '.join(row.value) or 'nothing'})")
        columns = {name: value for name, value in row.value.items() if name != key}
        for name in _RESERVED:
            if name in columns:
                raise row.error(
                    f"a column may not be called {name!r}: it is an argument of every reward function; rename it"
                )
        raw = row.value[key]
        text = _prompt_text(row, raw if isinstance(raw, str) else messages(row, key), tokenizer)
        ids = _encode(tokenizer, text, templated=not isinstance(raw, str))
        if not ids:
            raise row.error(f"{key!r} is empty")
        if len(ids) + max_new_tokens > context_length:
            raise row.error(
                f"the prompt has {len(ids)} tokens and --max-new-tokens {max_new_tokens} more do not fit the "
                f"model's context of {context_length}; shorten it or lower --max-new-tokens"
            )
        prompts.append(Prompt(text=text, ids=ids, raw=raw, columns=columns))
    if not prompts:
        raise UserError(f"--prompts {path}: no row in it")
    names = sorted({name for prompt in prompts for name in prompt.columns})
    return [replace(prompt, columns={name: prompt.columns.get(name) for name in names}) for prompt in prompts]


def read_preferences(path: Path, tokenizer: Any, *, max_length: int) -> tuple[list[Pair], int]:
    """Pairs of a file of preferences, in the forms of `preferences`, and the number of pairs dropped as too long.

    A sequence is `[prompt, reply, end]`, as the reward model is shown a roll-out; see `end_token_id`.

    Args:
        path: a file of rows, or a folder of them.
        tokenizer: a fast tokenizer of transformers.
        max_length: maximum sequence length in tokens; pairs with a longer sequence are dropped.

    Raises:
        UserError: a row is invalid; the message has file and line.
    """
    pairs, dropped = [], 0
    end = end_token_id(tokenizer)
    for row in rows_of(path, flag="--data"):
        chosen, rejected = ((*_sequence(row, reply, tokenizer), end) for reply in preference(row))
        if chosen == rejected:
            raise row.error("'chosen' and 'rejected' are the same; remove the row")
        if max(len(chosen), len(rejected)) > max_length:
            dropped += 1
        else:
            pairs.append(Pair(chosen=chosen, rejected=rejected))
    if not pairs and not dropped:
        raise UserError(f"--data {path}: no row in it")
    return pairs, dropped


def _sequence(row: Row, reply: Reply, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of prompt and reply, without the end token."""
    text = _prompt_text(row, reply.prompt, tokenizer)
    prompt = _encode(tokenizer, text, templated=not isinstance(reply.prompt, str))
    if not text:  # the reply is the whole text, and begins as a text does
        return _encode(tokenizer, reply.text, templated=False)
    return (*prompt, *encode_reply(tokenizer, reply.text))


def _prompt_text(row: Row, prompt: str | list[Message], tokenizer: Any) -> str:
    tools = tool_definitions(row)
    if isinstance(prompt, str):
        if tools:
            raise row.error("'tools' are rendered by the chat template; give messages instead of a text prompt")
        return prompt
    if tokenizer.chat_template is None:
        raise row.error("the prompt is messages and the model has no chat template; give texts")
    if prompt[-1]["role"] == "assistant":
        raise row.error("the prompt ends with an assistant message; the reply comes next, so end with the user's")
    try:
        return render_prompt(tokenizer, prompt, tools)
    except ValueError as error:
        raise row.error(str(error)) from error


def end_token_id(tokenizer: Any) -> int:
    """The token that ends a reply: the special token that the chat template writes after one, else the EOS token."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    reply = "a reply"
    messages = [{"role": "user", "content": "a prompt"}, {"role": "assistant", "content": reply}]
    try:
        _, found, rest = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(reply)
    except Exception:  # noqa: BLE001 -- a template may raise any exception, and may refuse these messages
        return tokenizer.eos_token_id
    special = {added.content: number for number, added in tokenizer.added_tokens_decoder.items() if added.special}
    written = [name for name in special if found and rest.lstrip().startswith(name)]
    return special[max(written, key=len)] if written else tokenizer.eos_token_id


def encode_prompt(tokenizer: Any, raw: str | list[dict[str, Any]]) -> tuple[int, ...]:
    """Token ids of a prompt, text or messages, by a tokenizer and its chat template, which may raise any exception."""
    if isinstance(raw, str):
        return _encode(tokenizer, raw, templated=False)
    text = tokenizer.apply_chat_template(raw, tokenize=False, add_generation_prompt=True)
    return _encode(tokenizer, text, templated=True)


def encode_reply(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a reply, without the token that ends it."""
    return _encode(tokenizer, text, templated=True)


def _encode(tokenizer: Any, text: str, *, templated: bool) -> tuple[int, ...]:
    """Token ids. No BOS is added to text from a chat template, which writes its own, nor before a reply."""
    return tuple(tokenizer(text, add_special_tokens=not templated)["input_ids"])
