"""Answers of status 5xx that are vLLM's own, each with its reason. Everything else that is 5xx is a fault of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Known:
    """A request that vLLM itself answers with 5xx, as test_every_upstream.py of infer finds."""

    name: str
    path: str  # regular expression
    said: str  # regular expression, in the answer
    why: str
    asked: str = ""  # regular expression, in the request


KNOWN: tuple[Known, ...] = (
    Known(
        name="API of other models",
        path=r"/.*",
        said=r'"message": ?"The model does not support the [a-z ]+ API", ?"type": ?"NotImplementedError"',
        why="vLLM opens routes for models of other kinds (/v1/systemone) and answers 501",
    ),
    Known(
        name="earlier reply without text",
        path=r"/v1/responses",
        said=r"list index out of range|'ResponseOutputRefusal' object has no attribute 'text'",
        why="vLLM takes the text of the first part of an earlier reply, which has none, or is a refusal",
    ),
    Known(
        name="tool output in parts",
        path=r"/v1/responses",
        said=r'"message": ?"", ?"type": ?"InternalServerError"',
        why="vLLM asserts that a part of a tool's output is a dictionary; with all fields of the item given, it is an object",
        asked=r'"type": ?"function_call_output"',
    ),
)


def is_known(row: Mapping[str, Any]) -> str | None:
    """The name of a known 5xx, None for any other. `row`: of hooks.py."""
    if row["status"] is None:
        return None
    for each in KNOWN:
        said, asked = row["said"], row.get("body", "")
        if re.fullmatch(each.path, row["path"]) and re.search(each.said, said) and re.search(each.asked, asked):
            return each.name
    return None
