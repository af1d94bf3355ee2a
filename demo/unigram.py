"""Baselines: unigram models of the training text, in bits per byte of the held-out text.

    python3 demo/unigram.py DATASET TRAIN_DIR HELDOUT_JSONL TARGET.json

Over tokens: frequencies in DATASET's train.bin, code length of its validation.bin. Over bytes: frequencies in the files
of TRAIN_DIR, code length of the texts in HELDOUT_JSONL. Frequencies are add-one smoothed. Standard library only.
"""

from __future__ import annotations

import array
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path


def code_length(train: Counter[int], symbols: int, held_out: Counter[int]) -> float:
    """Code length in bits of the held-out symbols under add-one smoothed training frequencies."""
    total = train.total() + symbols
    return sum(count * math.log2(total / (train[symbol] + 1)) for symbol, count in held_out.items())


def token_bits_per_byte(dataset: Path) -> float:
    """Bits per byte under token frequencies; end-of-document tokens are not counted."""
    facts = json.loads((dataset / "manifest.json").read_text(encoding="utf-8"))["facts"]
    train, held_out = (_tokens(dataset / f"{split}.bin", facts["dtype"]) for split in ("train", "validation"))
    del held_out[facts["eos_token_id"]]
    return code_length(train, facts["vocab_size"], held_out) / facts["splits"]["validation"]["utf8_bytes"]


def byte_bits_per_byte(train: Iterable[bytes], held_out: Iterable[bytes]) -> float:
    """Bits per byte under byte frequencies."""
    seen, unseen = Counter[int](), Counter[int]()
    for content in train:
        seen.update(content)
    for content in held_out:
        unseen.update(content)
    return code_length(seen, 256, unseen) / unseen.total()


def _tokens(path: Path, dtype: str) -> Counter[int]:
    tokens = array.array({"uint16": "H", "int32": "i"}[dtype])
    tokens.frombytes(path.read_bytes())
    return Counter(tokens)


def main(dataset: Path, train: Path, held_out: Path, target: Path) -> None:
    """Measure and write the result."""
    texts = [json.loads(line)["text"].encode() for line in held_out.read_text(encoding="utf-8").splitlines()]
    result = {
        "token_unigram": token_bits_per_byte(dataset),
        "byte_unigram": byte_bits_per_byte((file.read_bytes() for file in sorted(train.rglob("*.py"))), texts),
    }
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: unigram.py DATASET TRAIN_DIR HELDOUT_JSONL TARGET.json")
    main(*map(Path, sys.argv[1:]))
