"""Reads and tokenises prompts and preference pairs. Dropped rows are counted; errors have file and line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.data.sources import Piece, Row, rows
from shared.errors import UserError

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
        path: the JSON-lines file.
        tokenizer: a fast tokenizer of transformers.
        context_length: the model's, in tokens.
        max_new_tokens: tokens of the context reserved for the reply.

    Raises:
        UserError: a row is invalid or too long; the message has file and line.
    """
    prompts = []
    for row in _rows(path):
        key = "prompt" if "prompt" in row.value else "messages"
        if key not in row.value:
            raise row.error(f"no column 'prompt' or 'messages' (the row has: {', '.join(row.value) or 'nothing'})")
        columns = {name: value for name, value in row.value.items() if name != key}
        for name in _RESERVED:
            if name in columns:
                raise row.error(
                    f"a column may not be called {name!r}: it is an argument of every reward function; rename it"
                )
        text = _prompt_text(row, key, tokenizer)
        ids = _encode(tokenizer, text, templated=not isinstance(row.value[key], str))
        if not ids:
            raise row.error(f"{key!r} is empty")
        if len(ids) + max_new_tokens > context_length:
            raise row.error(
                f"the prompt has {len(ids)} tokens and --max-new-tokens {max_new_tokens} more do not fit the "
                f"model's context of {context_length}; shorten it or lower --max-new-tokens"
            )
        prompts.append(Prompt(text=text, ids=ids, raw=row.value[key], columns=columns))
    if not prompts:
        raise UserError(f"--prompts {path}: no row in it")
    names = sorted({name for prompt in prompts for name in prompt.columns})
    return [replace(prompt, columns={name: prompt.columns.get(name) for name in names}) for prompt in prompts]


def read_preferences(path: Path, tokenizer: Any, *, max_length: int) -> tuple[list[Pair], int]:
    """Pairs of a file with `{"prompt", "chosen", "rejected"}` rows, and the number of pairs dropped as too long.

    `prompt` is text or messages; `chosen` and `rejected` are text or one assistant message. A sequence is
    `[prompt, reply, end]`, as the reward model is shown a roll-out; see `end_token_id`.

    Args:
        path: the JSON-lines file.
        tokenizer: a fast tokenizer of transformers.
        max_length: maximum sequence length in tokens; pairs with a longer sequence are dropped.

    Raises:
        UserError: a row is invalid; the message has file and line.
    """
    pairs, dropped = [], 0
    end = end_token_id(tokenizer)
    for row in _rows(path):
        for key in ("prompt", "chosen", "rejected"):
            if key not in row.value:
                raise row.error(f"no column {key!r} (the row has: {', '.join(row.value) or 'nothing'})")
        text = _prompt_text(row, "prompt", tokenizer)
        prompt = _encode(tokenizer, text, templated=not isinstance(row.value["prompt"], str))
        chosen, rejected = (
            (*prompt, *encode_reply(tokenizer, _reply_text(row, key)), end) for key in ("chosen", "rejected")
        )
        if chosen == rejected:
            raise row.error("'chosen' and 'rejected' are the same; remove the row")
        if max(len(chosen), len(rejected)) > max_length:
            dropped += 1
        else:
            pairs.append(Pair(chosen=chosen, rejected=rejected))
    if not pairs and not dropped:
        raise UserError(f"--data {path}: no row in it")
    return pairs, dropped


def _rows(path: Path) -> Iterator[Row]:
    return rows(Piece(path=path, start=0, end=path.stat().st_size))


def _prompt_text(row: Row, key: str, tokenizer: Any) -> str:
    value = row.value[key]
    if isinstance(value, str):
        return value
    if not _is_messages(value):
        raise row.error(f"{key!r} is neither a text nor a list of messages with 'role' and 'content'")
    if tokenizer.chat_template is None:
        raise row.error(f"{key!r} holds messages and the model has no chat template; give texts")
    if value[-1]["role"] == "assistant":
        raise row.error(f"{key!r} ends with an assistant message; the reply comes next, so end with the user's")
    try:
        return tokenizer.apply_chat_template(value, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise any exception
        raise row.error(f"the chat template refuses {key!r}: {error}") from error


def _reply_text(row: Row, key: str) -> str:
    value = row.value[key]
    if isinstance(value, str):
        return value
    if _is_messages(value) and len(value) == 1 and value[0]["role"] == "assistant":
        return value[0]["content"]
    raise row.error(f"{key!r} is neither a text nor a list of one assistant message")


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


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
