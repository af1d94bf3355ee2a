"""The form that the real model learns, as a check of one reply. Standard library only."""

from __future__ import annotations

import json
from typing import Any

KEYS = {"answer", "confidence"}
CONFIDENCES = {"high", "medium", "low"}


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


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found
