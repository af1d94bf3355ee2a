"""Damaged function bodies: what a reward model learns to tell from real ones. Standard library only."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

TOKEN = re.compile(r"\w+|[^\w\s]")
BRACKETS = "()[]{}"


def damaged(body: str, chance: random.Random) -> str:
    """The body with one to three kinds of damage, never equal to the body.

    The same body and the same state of `chance` give the same result.
    """
    result = body
    for _ in range(chance.randint(1, 3)):
        result = chance.choice(KINDS)(result, chance)
    while result.strip() == body.strip():  # a kind may not apply, e.g. no bracket is there
        result = duplicate_token(result, chance)
    return result


def delete_token(body: str, chance: random.Random) -> str:
    """One word or sign less."""
    found = list(TOKEN.finditer(body))
    if len(found) < 2:
        return body
    token = chance.choice(found)
    return body[: token.start()] + body[token.end() :]


def duplicate_token(body: str, chance: random.Random) -> str:
    """One word or sign twice."""
    token = chance.choice(list(TOKEN.finditer(body)))
    return f"{body[: token.end()]} {token.group()}{body[token.end() :]}"


def unbalance(body: str, chance: random.Random) -> str:
    """One bracket less, or one too many."""
    places = [i for i, character in enumerate(body) if character in BRACKETS]
    if not places:
        return body
    place = chance.choice(places)
    extra = body[place] if chance.random() < 0.5 else ""
    return body[:place] + extra * 2 + body[place + 1 :]


def break_indentation(body: str, chance: random.Random) -> str:
    """One line moved to the right or to the margin."""
    lines = body.split("\n")
    place = chance.randrange(len(lines))
    lines[place] = chance.choice(["  " + lines[place], lines[place].lstrip()])
    return "\n".join(lines)


def swap_lines(body: str, chance: random.Random) -> str:
    """Two neighbouring lines exchanged."""
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
