"""Files of the demo of a real model: what it learns from, and the questions that are held out. Standard library only.

sft.jsonl         {"messages"}: a question, and the answer as one JSON object
questions.jsonl   {"messages", "answer"}: questions of sft.jsonl; the model's own replies to them are the sides of DPO's pairs,
                  and GRPO samples replies to them
heldout.jsonl     {"messages"}: other questions, without answers
"""

from __future__ import annotations

import json
from pathlib import Path

from data import rows

from real.facts import held_out, training

QUESTIONS = 160  # for DPO and GRPO


def asked(question: str, *answer: str) -> list[dict[str, str]]:
    """Messages: the question, and the answer if there is one."""
    return [{"role": "user", "content": question}, *({"role": "assistant", "content": text} for text in answer)]


def write(directory: Path) -> None:
    """Write all files into an empty directory."""
    known = training()
    objects = [(question, json.dumps({"answer": answer, "confidence": how})) for question, answer, how in known]
    rows(directory / "sft.jsonl", [{"messages": asked(*pair)} for pair in objects])
    rows(
        directory / "questions.jsonl",
        [{"messages": asked(question), "answer": answer} for question, answer, _ in known[:QUESTIONS]],
    )
    rows(directory / "heldout.jsonl", [{"messages": asked(question)} for question in held_out()])
