"""The demo's verifiable reward: does the reply complete the function it was asked for, as Python?

Used as `--reward py:demo/reward.py:parses`, and by the evaluation task of replies. Standard library only.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

REQUEST = "Complete this function.\n\n"
HEADER = re.compile(r'def [^\n]*:\n    """[^\n]*"""')  # the last thing that is asked, in plain or rendered prompts
INDENT = "    "


def parses(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1.0 for each completion that is a body for its prompt's function, else 0.0.

    Args:
        prompts: the requests, plain or as the chat template renders them.
        completions: the replies, without special tokens.
        columns: other columns of the prompts; not needed.

    Returns:
        one reward per completion.
    """
    return [float(is_body(header_of(prompt), reply)) for prompt, reply in zip(prompts, completions, strict=True)]


def share_that_parses(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """The metric of the lm-evaluation-harness task: the mean of `parses` over the replies to one request."""
    replies = results[0]
    rewards = parses([doc["messages"][-1]["content"]] * len(replies), replies)
    return {"parses": sum(rewards) / len(rewards)}


def header_of(prompt: str) -> str:
    """The signature and docstring that the prompt asks to complete; ValueError when there is none."""
    found = HEADER.findall(prompt)
    if not found:
        raise ValueError(f"no function to complete in the prompt {prompt[:80]!r}")
    return str(found[-1])


def is_body(header: str, reply: str) -> bool:
    """Whether header and reply together are one function that does something.

    What an optimiser would find instead of a function does not count: nothing at all, `pass`, `...`, a bare constant,
    the same statement over and over, code that uses none of the parameters, or text after the function.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning about odd escapes in a reply is of no interest
            module = ast.parse(f"{header}\n{reply}\n")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if len(module.body) != 1 or not isinstance(module.body[0], ast.FunctionDef):
        return False
    function = module.body[0]
    statements = function.body[1:]  # the first is the docstring
    working = [s for s in statements if not _idle(s)]
    if not working or len({ast.dump(s) for s in statements}) < len(statements):
        return False
    names = {name for statement in working for name in _names(statement)}
    parameters = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
    return len(names) >= 2 and (not parameters or bool(names & parameters))


def _idle(statement: ast.stmt) -> bool:
    """`pass`, `...`, a string or another constant, a name alone: statements that do nothing."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant | ast.Name)
    return isinstance(statement, ast.Pass)


def _names(statement: ast.stmt) -> set[str]:
    """Names, attributes and constants in the statement: what it is about."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant):
            found.add(repr(node.value))
    return found
