"""`--prompts` of `sft train`: the conversations that the model in training answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from shared.data.chat_template import render_prompt
from shared.data.messages import conversation_messages, tool_definitions
from shared.data.sources import Row, rows_of
from shared.data.tokenizer import open_tokenizer
from shared.errors import UserError
from shared.training.config import TrainingConfig
from shared.training.data_sources import DataSource
from shared.training.plan import Inputs
from shared.training.replies import Prompt, Replies
from shared.training.run_hf_files import end_tokens

MOST = 64  # rows: replies are made token by token, without a cache


def replies_of(path: Path, *, every: int, limit: int, config: TrainingConfig, inputs: Inputs) -> Replies:
    """The prompts of a file, as the chat template of the data renders them.

    Args:
        path: rows with `messages`, or with `prompt`: text as it is, or messages. A last answer is left out.
        every: updates.
        limit: tokens of a reply, at most.
        config: of the run.
        inputs: of the run.

    Raises:
        UserError: a row is invalid or too long; with its file and line.
    """
    if config.parallel.context > 1:
        raise UserError("--prompts: replies are not made with --context-parallel above 1; leave one out")
    data: DataSource = inputs.data[0]
    tokenizer = open_tokenizer(data.tokenizer, flag="--data")
    context = inputs.architecture.max_position_embeddings
    prompts: list[Prompt] = []
    for row in rows_of(path, flag="--prompts"):
        if len(prompts) == MOST:
            raise UserError(f"--prompts {path} has more than {MOST} rows; replies are made token by token: give fewer")
        prompts.append(_prompt(row, tokenizer, context))
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt")

    def decode(tokens: Any) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    ends = frozenset(end_tokens(inputs)) | {int(tokenizer.eos_token_id)}
    return Replies(prompts=tuple(prompts), every=every, limit=limit, ends=ends, decode=decode)


def _prompt(row: Row, tokenizer: Any, context: int) -> Prompt:
    key = next((name for name in ("messages", "prompt") if name in row.value), None)
    if key is None:
        raise row.error(
            f"neither 'messages' nor 'prompt' is a key of this row (it has: {', '.join(list(row.value)[:8])})"
        )
    if isinstance(row.value[key], str):
        text: str = row.value[key]
        ids = tokenizer(text)["input_ids"]
    else:
        messages = conversation_messages(row, key)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        try:
            text = render_prompt(tokenizer, messages, tool_definitions(row))
        except ValueError as error:
            raise row.error(str(error)) from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or not re.search(r"\S", text):
        raise row.error("the prompt is empty")
    if len(ids) >= context:
        raise row.error(f"the prompt has {len(ids)} tokens, and the model's context {context}")
    return Prompt(text=text, ids=tuple(ids))
