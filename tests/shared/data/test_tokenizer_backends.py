"""The fast back end beside `tokenizers`, and that a difference is seen, whichever it is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from shared.data import tokenizer_backends as module
from shared.data.tokenizer_backends import Fast, Reference, choose, first_difference
from shared.errors import UserError
from tests.workers import ROOT

SOURCES = sorted(Path(module.__file__).parent.glob("*.py"))
TEXTS = [path.read_text() for path in SOURCES] + [
    "caf\u00e9 \u4f60\u597d \U0001f600 1234 5 67\u0661\u0662  <|end|><|not special|>  \r\n\n\n x\ty 's 'LL don't",
    "a   5 and  66,\n\n 7 \t8  x",  # white space before digits
    " ",
    "\n\n",
    "\u00a0\u3000 a",
    "",
]
SPECIAL = [AddedToken("<|end|>", special=True, normalized=False)]


def _trained(pre_tokenizer: Any) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<|not special|>", special=False, normalized=False)])
    return str(tokenizer.to_str())


@pytest.fixture(scope="module")
def kinds() -> dict[str, str]:
    from tools.pretrain.train_bpe import train

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "ours": str(train(iter(TEXTS), 2000).to_str()),
        "gpt2": _trained(gpt2),
        "digits": _trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])),
    }


def _choose(kind: str, texts: list[str], wanted: str = "auto") -> module.Choice:
    return choose(wanted, kind, iter(texts), source_bytes=1 << 30, workers=1)


@pytest.mark.parametrize("name", ["ours", "gpt2", "digits"])
def test_the_ids_are_those_of_tokenizers(kinds: dict[str, str], name: str) -> None:
    assert first_difference(Fast(kinds[name]), Reference(kinds[name]), TEXTS) is None
    choice = _choose(kinds[name], TEXTS)
    assert (choice.name, choice.compared_bytes) == ("fastokens", sum(len(text.encode()) for text in TEXTS))
    ids, lengths = Fast(kinds[name]).encode(["a<|end|>", ""])
    right = Tokenizer.from_str(kinds[name])
    right.encode_special_tokens = True
    assert ids.tolist() == right.encode("a<|end|>", add_special_tokens=False).ids
    assert lengths.tolist() == [len(ids), 0]
    assert 0 not in ids[1:], "a special token spelt out is text"


def test_digits_as_one_pattern_are_what_is_given_to_fastokens(kinds: dict[str, str]) -> None:
    content = json.loads(kinds["digits"])
    steps = module._in_one_pattern(content)["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Split", "ByteLevel"]
    grouped = content | {"pre_tokenizer": json.loads(json.dumps(content["pre_tokenizer"]))}
    grouped["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    assert module._in_one_pattern(grouped) == grouped
    assert module._in_one_pattern(json.loads(kinds["gpt2"])) == json.loads(kinds["gpt2"])


def test_other_ids_and_what_it_cannot_run_fall_back_and_say_why(
    kinds: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Fast):
        def encode(self, texts: list[str]) -> Any:
            ids, lengths = super().encode(texts)
            return np.where(ids == ids[0], ids + 1, ids), lengths

    monkeypatch.setattr(module, "Fast", Wrong)
    choice = _choose(kinds["ours"], ["first text", "second text"])
    assert (choice.name, choice.reason) == ("tokenizers", "fastokens gives other ids for 'first text'")
    monkeypatch.undo()
    unknown = json.loads(kinds["ours"]) | {"model": {"type": "of the future"}}
    choice = _choose(json.dumps(unknown), TEXTS)
    assert choice.name == "tokenizers"
    assert "fastokens cannot run this tokenizer (" in choice.reason
    assert _choose(kinds["ours"], TEXTS, "tokenizers").reason == "--tokenizer-backend"
    small = choose("auto", kinds["ours"], iter(TEXTS), source_bytes=1000, workers=1)
    assert (small.name, "too little" in small.reason) == ("tokenizers", True)


def test_only_the_beginning_is_compared_and_errors_of_reading_pass(
    kinds: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMPARED_BYTES", 1000)

    def texts() -> Any:
        yield from ["x" * 100] * 10
        raise UserError("not read")

    assert choose("auto", kinds["ours"], texts(), source_bytes=1 << 30, workers=1).compared_bytes == 1000
    monkeypatch.setattr(module, "COMPARED_BYTES", 1001)
    with pytest.raises(UserError, match="not read"):
        choose("auto", kinds["ours"], texts(), source_bytes=1 << 30, workers=1)


def test_the_comparison_takes_the_cores_it_is_given(kinds: dict[str, str]) -> None:
    script = (
        "import os, sys; from shared.data.tokenizer_backends import choose\n"
        "content = sys.stdin.read(); before = len(os.listdir('/proc/self/task'))\n"
        "choice = choose('auto', content, ['some words of text'] * 5000, source_bytes=1 << 30, workers=5)\n"
        "print(choice.name, len(os.listdir('/proc/self/task')) - before)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAYON", "TOKENIZERS"))}
    words = [sys.executable, "-c", script]
    done = subprocess.run(
        words, input=kinds["gpt2"], env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    )
    name, threads = done.stdout.split()
    assert name == "fastokens"
    assert int(threads) >= 5, "one thread for each core, at least of tokenizers"


def test_the_first_text_that_differs_is_found() -> None:
    class Known:
        def __init__(self, *texts: list[int]) -> None:
            self.texts = texts

        def encode(self, texts: list[str]) -> Any:
            return np.array([i for ids in self.texts for i in ids], np.uint32), np.array([len(i) for i in self.texts])

    right = Known([1, 2], [], [3], [4])
    assert first_difference(right, right, [""] * 4) is None
    assert first_difference(Known([1, 2], [], [3], [5]), right, [""] * 4) == 3
    assert first_difference(Known([1], [2], [3], [4]), right, [""] * 4) == 0  # the same ids, other texts
    assert first_difference(Known([1, 2], [7], [3], [4]), right, [""] * 4) == 1
