"""Options that `sft prepare` and `sft preview` share. Standard library and pydantic only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from shared.cli import ExistingFile, Positive

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt"]
Spans = Literal["auto", "generation", "rendered", "last"]
OnError = Literal["stop", "set-aside"]


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """Rows to conversations to tokens.

    Attributes:
        format: the form of the rows; auto looks at the keys of each.
        messages_column: the column that holds the messages, if it has another name.
        split: of folders of data sets, the split to read: train.
        limit: conversations to read from the source, at most.
        on_error: what to do with a row that cannot be read or rendered: stop, or set-aside, into rejects.jsonl.
        chat_template: a Jinja file to render with, instead of the tokenizer's own template; it is published.
        template_argument: variables of the chat template, separated by commas: enable_thinking=false.
        spans: how trained tokens are found: by generation marks of the template, located in the rendered text, or what
            follows the last prompt; auto: by marks if there are any, else located.
        assistant_only_last: a loss on the last assistant message only.
    """

    format: Format = "auto"
    messages_column: Annotated[str, Field(min_length=1)] | None = None
    split: Annotated[str, Field(min_length=1)] | None = None
    limit: Positive | None = None
    on_error: OnError = "stop"
    chat_template: ExistingFile | None = None
    template_argument: tuple[str, ...] = ()
    spans: Spans = "auto"
    assistant_only_last: bool = False


# Options that the first version did not have.
ADDED = (
    *("messages_column", "split", "limit", "on_error", "chat_template", "template_argument", "spans"),
    "assistant_only_last",
)
