"""Reads and tokenises prompts and preference pairs. Dropped rows are counted; errors have file and line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.data.chat_template import render_prompt
from shared.data.messages import Message, tool_definitions
from shared.data.sources import Row, rows_of
from shared.errors import UserError
from tools.rlhf.preferences import Reply, labelled, messages, preference

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


@dataclass(frozen=True, kw_only=True)
class RankedReplies:
    """A preference between two replies to one prompt, as a policy learns from it; replies end with the end token."""

    prompt: tuple[int, ...]
    """At least one token: the first of a sequence has no probability."""
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longer side with the prompt."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, kw_only=True)
class LabelledReply:
    """A reply, through its end token, that is desirable or not."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    label: bool


def read_prompts(
    path: Path, tokenizer: Any, *, context_length: int, max_new_tokens: int, flag: str = "--prompts"
) -> list[Prompt]:
    """Prompts of a file with `{"prompt": text or messages}` or `{"messages": [...]}` rows.

    Args:
        path: a file of rows, or a folder of them.
        tokenizer: a fast tokenizer of transformers.
        context_length: the model's, in tokens.
        max_new_tokens: tokens of the context reserved for the reply.
        flag: for errors.

    Raises:
        UserError: a row is invalid or too long; the message has file and line.
    """
    prompts = []
    for row in rows_of(path, flag=flag):
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
        raise UserError(f"{flag} {path}: no row in it")
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
    for _, sides in _pairs(path, tokenizer):
        chosen, rejected = (prompt + reply for _, prompt, reply in sides)
        if max(len(chosen), len(rejected)) > max_length:
            dropped += 1
        else:
            pairs.append(Pair(chosen=chosen, rejected=rejected))
    if not pairs and not dropped:
        raise UserError(f"--data {path}: no row in it")
    return pairs, dropped


def read_ranked_replies(
    path: Path, tokenizer: Any, *, max_length: int, context_length: int
) -> tuple[list[RankedReplies], dict[str, int]]:
    """Pairs of a file of preferences for training a policy, and the numbers of pairs dropped, by reason.

    Of whole texts, the prompt is what their tokens have in common. Conversations that part before their last reply have
    two prompts: DPO's loss, from which the prompt's normalisation cancels, is not defined for them. They are dropped.

    Args:
        path: a file of rows, or a folder of them.
        tokenizer: a fast tokenizer of transformers.
        max_length: maximum sequence length in tokens; pairs with a longer sequence are dropped.
        context_length: the model's, in tokens.

    Raises:
        UserError: a row is invalid, a reply empty, or a prompt fills the model's context; the message has file and line.
    """
    pairs, dropped = [], {"too long": 0, "of two prompts": 0}
    for row, ((chosen, prompt, better), (rejected, other, worse)) in _pairs(path, tokenizer):
        _check_reply(row, "'chosen'", chosen, prompt, context_length)
        _check_reply(row, "'rejected'", rejected, other, context_length)
        if not prompt and not other:
            shared = next(i for i, ids in enumerate(zip(better, worse, strict=False)) if ids[0] != ids[1])
            prompt = other = better[:shared]
            better, worse = better[shared:], worse[shared:]
        if not prompt:
            raise row.error("'prompt' is empty, and the replies begin with different tokens; give a prompt")
        pair = RankedReplies(prompt=prompt, chosen=better, rejected=worse)
        if prompt != other:
            dropped["of two prompts"] += 1
        elif pair.longest > max_length:
            dropped["too long"] += 1
        else:
            pairs.append(pair)
    if not pairs and not any(dropped.values()):
        raise UserError(f"--data {path}: no row in it")
    return pairs, dropped


def read_labelled_replies(
    path: Path, tokenizer: Any, *, max_length: int, context_length: int
) -> tuple[list[LabelledReply], dict[str, int]]:
    """Replies of a file of labelled replies or of preferences, and the numbers of replies dropped, by reason.

    A whole text's prompt is its first token, which has no probability. Arguments and errors are those of
    `read_ranked_replies`.
    """
    replies, dropped = [], {"too long": 0}
    end = end_token_id(tokenizer)
    for row in rows_of(path, flag="--data"):
        for reply, label in labelled(row):
            prompt, ids = sequence(row, reply, tokenizer, end)
            _check_reply(row, "a desirable row" if label else "an undesirable row", reply, prompt, context_length)
            if not prompt:
                prompt, ids = ids[:1], ids[1:]
            if len(prompt) + len(ids) > max_length:
                dropped["too long"] += 1
            else:
                replies.append(LabelledReply(prompt=prompt, reply=ids, label=label))
    if not replies and not dropped["too long"]:
        raise UserError(f"--data {path}: no row in it")
    return replies, dropped


_Side = tuple[Reply, tuple[int, ...], tuple[int, ...]]
"""A reply, token ids of its prompt, and token ids of the reply through the end token."""


def _pairs(path: Path, tokenizer: Any) -> Iterator[tuple[Row, tuple[_Side, _Side]]]:
    """Rows with both sides; UserError for a row whose sides are the same tokens."""
    end = end_token_id(tokenizer)
    for row in rows_of(path, flag="--data"):
        chosen, rejected = ((reply, *sequence(row, reply, tokenizer, end)) for reply in preference(row))
        if chosen[1:] == rejected[1:]:
            raise row.error("'chosen' and 'rejected' are the same; remove the row")
        yield row, (chosen, rejected)


def _check_reply(row: Row, what: str, reply: Reply, prompt: tuple[int, ...], context_length: int) -> None:
    if not reply.text.strip():
        raise row.error(f"the reply of {what} is empty: there is nothing to learn from; remove the row")
    if len(prompt) >= context_length:
        raise row.error(
            f"the prompt of {what} has {len(prompt)} tokens, which fill the model's context of {context_length}; "
            "shorten it or remove the row"
        )


def sequence(row: Row, reply: Reply, tokenizer: Any, end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of the prompt, and of the reply with the end token. UserError, of the row, if its prompt is not rendered."""
    text = _prompt_text(row, reply.prompt, tokenizer)
    prompt = _encode(tokenizer, text, templated=not isinstance(reply.prompt, str))
    if not text:  # the reply is the whole text, and begins as a text does
        return (), (*_encode(tokenizer, reply.text, templated=False), end)
    return prompt, (*encode_reply(tokenizer, reply.text), end)


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
