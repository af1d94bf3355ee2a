"""Preference pairs of the model's own replies: the best of several to a question before one without the form.

`infer generate --samples` published the replies, for rows with `messages` and `answer`. Both sides are the model's own: a pair
with an answer of ours is told apart by its words, which the policy would not say before or after the training; tried, it
unlearnt facts and kept its form. Standard library only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from data import rows

from real.form import short

END = re.compile(r"(?<=[.!?])\s+")


def pairs(generations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each question that has both: the reply with the highest reward of GRPO, and the first that has none."""
    found = []
    for row in generations:
        given = zip(row["completions"], row["finish_reason"], strict=True)
        replies = [whole_sentences(reply, ended=reason == "stop") for reply, reason in given]
        rewards = dict(zip(replies, short(replies, [row["answer"]] * len(replies)), strict=True))
        chosen = max(rewards, key=rewards.__getitem__)
        rejected = next((reply for reply, reward in rewards.items() if reply and not reward), None)
        if rewards[chosen] and rejected:
            found.append({"prompt": row["messages"], "chosen": chosen, "rejected": rejected})
    return found


def whole_sentences(reply: str, *, ended: bool) -> str:
    """The reply without its last sentence if that was cut at the limit, unless it is the only one.

    A pair's sides end with the end token: a policy must not learn from it that texts end in the middle of a sentence.
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
