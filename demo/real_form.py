"""The forms that the real model learns, as checks of one reply and as rewards. Standard library only.

`short` is a `--reward` of GRPO (py:demo/real_form.py:short); the others judge the tables of answers.
"""

from __future__ import annotations

import json
import re
from typing import Any

KEYS = {"answer", "confidence"}
CONFIDENCES = {"high", "medium", "low"}
SENTENCE_WORDS = (4, 20)  # of a short sentence: a shorter reply says nothing
SENTENCE = re.compile(r"[^.!?\n]*\w[.!?]")


def valid_json(reply: str) -> bool:
    """Whether the reply is one JSON object with an answer, which is not empty, and a confidence, and nothing else."""
    try:
        found = json.loads(reply, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or found.keys() != KEYS:
        return False
    answer, confidence = found["answer"], found["confidence"]
    return (
        isinstance(answer, str) and bool(answer.strip()) and isinstance(confidence, str) and confidence in CONFIDENCES
    )


def one_sentence(reply: str) -> bool:
    """Whether the reply is one sentence of 4 to 20 words, ended."""
    words = len(reply.split())
    return SENTENCE_WORDS[0] <= words <= SENTENCE_WORDS[1] and SENTENCE.fullmatch(reply.strip()) is not None


FORMS = {"json": valid_json, "sentence": one_sentence}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def short(completions: list[str]) -> list[float]:
    """The reward of GRPO: 1 for a reply of one short sentence, else 0."""
    return [float(one_sentence(reply)) for reply in completions]
