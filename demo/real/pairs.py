"""Preference pairs: a short answer of ours before the model's own reply.

`infer generate` published the replies, for rows with `messages` and `answer`. Standard library only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from data import rows

from real.form import one_sentence

END = re.compile(r"(?<=[.!?])\s+")


def pairs(generations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A pair of each row whose answer is one short sentence, and whose reply is not."""
    found = []
    for row in generations:
        rejected = whole_sentences(row["completion"], ended=row["finish_reason"] == "stop")
        if one_sentence(row["answer"]) and rejected and not one_sentence(rejected):
            found.append({"prompt": row["messages"], "chosen": row["answer"], "rejected": rejected})
    return found


def whole_sentences(reply: str, *, ended: bool) -> str:
    """The reply without its last sentence if that was cut at the limit, unless it is the only one.

    A pair's sides end with the end token: a policy must not learn of it that texts end in the middle of a sentence.
    """
    parts = END.split(reply.strip())
    return " ".join(parts if ended or len(parts) == 1 else parts[:-1])


def write(generations: Path, target: Path) -> None:
    """Write the pairs of a directory of `infer generate`."""
    if target.exists():
        print(f"already done: {target}")
        return
    lines = (generations / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    found = pairs([json.loads(line) for line in lines])
    beside = target.with_name(target.name + ".new")
    rows(beside, found)
    beside.replace(target)
    print(f"{len(found)} pairs of {len(lines)} questions")
