"""LoRA of a Megatron directory, in the environment of sft: `sft_worker.py MEGATRON TOKENIZER FOLDER`.

Writes FOLDER/sft-mg, a run of `sft train --lora-rank`.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from tests.tools.infer.tiny_models import TEXT
from tools.sft.cli import tool

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def call(*words: object) -> None:
    try:
        tool.run([str(word) for word in words])
    except SystemExit as end:
        if end.code:
            raise


def main(source: Path, tokenizer: Path, folder: Path) -> None:
    (folder / "sft.jinja").write_text(TEMPLATE)
    words = TEXT.split()
    rows = [{"prompt": one, "completion": other} for one, other in itertools.pairwise(words)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = ("--source", folder / "chats.jsonl", "--tokenizer", tokenizer, "--chat-template", folder / "sft.jinja")
    call("prepare", *chats, "--target", folder / "chats", "--sequence-length", 64)
    words = ("--source", source, "--data", folder / "chats", "--target", folder / "sft-mg", "--precision", "fp32")
    size = ("--global-batch-size", 2, "--micro-batch-size", 2, "--steps", 2)
    call("train", *words, *size, "--lora-rank", 4, "--lora-alpha", 8, "--learning-rate", 5e-2)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
