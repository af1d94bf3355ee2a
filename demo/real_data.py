"""Files of the demo of a real model: what it learns from, and the questions that are held out.

    python3 demo/real_data.py DIR

Written to DIR, standard library only:

    sft.jsonl       {"messages"}: a question, and the answer as one JSON object
    heldout.jsonl   {"messages"}: other questions, without answers
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data import rows, written_whole
from real_facts import held_out, training


def asked(question: str, *answer: str) -> list[dict[str, str]]:
    """Messages: the question, and the answer if there is one."""
    return [{"role": "user", "content": question}, *({"role": "assistant", "content": text} for text in answer)]


def write(directory: Path) -> None:
    """Write all files into an empty directory."""
    known = training()
    objects = [(question, json.dumps({"answer": answer, "confidence": how})) for question, answer, how in known]
    rows(directory / "sft.jsonl", [{"messages": asked(*pair)} for pair in objects])
    rows(directory / "heldout.jsonl", [{"messages": asked(question)} for question in held_out()])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: real_data.py DIR")
    written_whole(Path(sys.argv[1]), write)
