"""The forms that the real model learns, as checks of one reply, and the reward of GRPO. Standard library only.

`short` is used as `--reward py:demo/real/form.py:short`; the checks judge the tables of answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

KEYS = {"answer", "confidence"}
CONFIDENCES = {"high", "medium", "low"}
SENTENCE = re.compile(r"[^.!?\n]*\w[.!?]")
SENTENCE_WORDS = (4, 20)
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


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
    """Whether the reply is one sentence with its full stop, of 4 to 20 words, four of them different.

    So it is raised neither by saying nothing or one word over and over, nor by stopping anywhere: a text that was cut has no
    full stop, or has one within.
    """
    words = spoken(reply)
    return (
        SENTENCE.fullmatch(reply.strip()) is not None
        and len(words) <= SENTENCE_WORDS[1]
        and len(set(words)) >= SENTENCE_WORDS[0]
    )


FORMS: dict[str, Callable[[str], bool]] = {"json": valid_json, "sentence": one_sentence}
LABELS = {
    "json": "one JSON object with answer and confidence",
    "sentence": f"one sentence of {SENTENCE_WORDS[0]} to {SENTENCE_WORDS[1]} words",
}


def short(completions: list[str], answer: list[str]) -> list[float]:
    """The reward of GRPO: 0 without the form of `one_sentence`; with it 0.5, and up to 0.5 more for the words of the answer.

    The second half is F1 of the words, as in SQuAD (Rajpurkar et al. 2016): one sentence for every question would earn little
    more than half.

    Args:
        completions: the replies, without special tokens.
        answer: the column of the prompts, our own answer to each question.
    """
    pairs = zip(completions, answer, strict=True)
    return [0.5 + 0.5 * _common(spoken(reply), spoken(known)) if one_sentence(reply) else 0.0 for reply, known in pairs]


def spoken(text: str) -> list[str]:
    """Words in lower case; marks and signs are none."""
    return WORD.findall(text.casefold())


def _common(reply: list[str], known: list[str]) -> float:
    """F1 of two texts' different words."""
    one, other = set(reply), set(known)
    return 2 * len(one & other) / (len(one) + len(other))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found
