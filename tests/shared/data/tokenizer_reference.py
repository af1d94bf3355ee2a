"""sentencepiece and tiktoken themselves, in infer's environment: `python tokenizer_reference.py DIRECTORY`.

DIRECTORY/cases.json: by name {train: arguments of sentencepiece's trainer, or pattern: of tiktoken; special: token -> id; texts}.
Writes DIRECTORY/<name>/tokenizer.model, or reads it where there are no arguments, or DIRECTORY/<name>/qwen.tiktoken, and writes
DIRECTORY/results.json: by case the ids of each text. A text is cut at special tokens, as the slow classes do, and each part is
encoded by itself.
"""

import base64
import json
import re
import sys
import unicodedata
from pathlib import Path

import sentencepiece
import tiktoken


def of_sentencepiece(folder: Path, corpus: Path, train: dict | None):
    if train is not None:
        trained(folder, corpus, train)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode


def trained(folder: Path, corpus: Path, train: dict) -> None:
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
        **train,
    )


def of_tiktoken(folder: Path, pattern: str):
    lines = (folder / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    encoding = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda text: encoding.encode_ordinary(unicodedata.normalize("NFC", text))


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    results = {}
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        folder = directory / name
        if "pattern" in case:
            encode = of_tiktoken(folder, case["pattern"])
        else:
            encode = of_sentencepiece(folder, directory / "corpus.txt", case.get("train"))
        cut = re.compile(f"({'|'.join(map(re.escape, case['special'])) or '(?!)'})")
        results[name] = []
        for text in case["texts"]:
            ids = []
            for part in cut.split(text):
                ids += [case["special"][part]] if part in case["special"] else encode(part)
            results[name].append(ids)
    (directory / "results.json").write_text(json.dumps(results))
