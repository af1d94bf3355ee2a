"""The demo's verifiable reward: does the reply complete the function it was asked for, as Python?

Used as `--reward py:demo/reward.py:parses`, and by the evaluation task of replies. Standard library only.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

REQUEST = "Complete this function.\n\n"
HEADER = re.compile(r'def [^\n]*:\n    """[^\n]*"""')  # of raw and rendered prompts; the last match is the request
INDENT = "    "


def parses(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1.0 for each completion that is a body for its prompt's function, else 0.0.

    Args:
        prompts: the requests, plain or as the chat template renders them.
        completions: the replies, without special tokens.
        columns: other columns of the prompts; unused.

    Returns:
        one reward per completion.
    """
    return [float(is_body(header_of(prompt), reply)) for prompt, reply in zip(prompts, completions, strict=True)]


def share_that_parses(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """The metrics of the lm-evaluation-harness task: means over the replies to one request, of `parses` and of the length.

    The length shows what a rise of `parses` is made of: a short body has less that can go wrong.
    """
    replies = results[0]
    rewards = parses([doc["messages"][-1]["content"]] * len(replies), replies)
    return {
        "parses": sum(rewards) / len(rewards),
        "characters": sum(len(reply.strip()) for reply in replies) / len(replies),
    }


def header_of(prompt: str) -> str:
    """Signature and docstring of the function to complete; ValueError if there is none."""
    found = HEADER.findall(prompt)
    if not found:
        raise ValueError(f"no function to complete in the prompt {prompt[:80]!r}")
    return str(found[-1])


def is_body(header: str, reply: str) -> bool:
    """Whether header + reply is one non-trivial function.

    Reward hacks do not count: an empty body, `pass`, `...`, a bare constant, repeated statements, code that uses none of
    the parameters, text after the function.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning about escapes in a reply
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
    """Whether a statement has no effect: `pass`, `...`, a constant, a bare name."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant | ast.Name)
    return isinstance(statement, ast.Pass)


def _names(statement: ast.stmt) -> set[str]:
    """Names, attributes and constants in the statement."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant):
            found.add(repr(node.value))
    return found
