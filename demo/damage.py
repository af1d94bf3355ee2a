"""Damages function bodies: the rejected replies of preference pairs. Standard library only."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

TOKEN = re.compile(r"\w+|[^\w\s]")
BRACKETS = "()[]{}"


def damaged(body: str, chance: random.Random) -> str:
    """The body with one to three kinds of damage; never equal to the body. Deterministic in body and `chance`."""
    result = body
    for _ in range(chance.randint(1, 3)):
        result = chance.choice(KINDS)(result, chance)
    while result.strip() == body.strip():  # a kind may not apply, e.g. without brackets
        result = duplicate_token(result, chance)
    return result


def delete_token(body: str, chance: random.Random) -> str:
    """Delete one token."""
    found = list(TOKEN.finditer(body))
    if len(found) < 2:
        return body
    token = chance.choice(found)
    return body[: token.start()] + body[token.end() :]


def duplicate_token(body: str, chance: random.Random) -> str:
    """Duplicate one token."""
    token = chance.choice(list(TOKEN.finditer(body)))
    return f"{body[: token.end()]} {token.group()}{body[token.end() :]}"


def unbalance(body: str, chance: random.Random) -> str:
    """Delete or add one bracket."""
    places = [i for i, character in enumerate(body) if character in BRACKETS]
    if not places:
        return body
    place = chance.choice(places)
    extra = body[place] if chance.random() < 0.5 else ""
    return body[:place] + extra * 2 + body[place + 1 :]


def break_indentation(body: str, chance: random.Random) -> str:
    """Indent one line further, or remove its indentation."""
    lines = body.split("\n")
    place = chance.randrange(len(lines))
    lines[place] = chance.choice(["  " + lines[place], lines[place].lstrip()])
    return "\n".join(lines)


def swap_lines(body: str, chance: random.Random) -> str:
    """Swap two adjacent lines."""
    lines = body.split("\n")
    if len(lines) < 2:
        return body
    place = chance.randrange(len(lines) - 1)
    lines[place], lines[place + 1] = lines[place + 1], lines[place]
    return "\n".join(lines)


KINDS: tuple[Callable[[str, random.Random], str], ...] = (
    delete_token,
    duplicate_token,
    unbalance,
    break_indentation,
    swap_lines,
)
