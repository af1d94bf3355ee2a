"""The fast back end beside `tokenizers`, and that a difference is seen, whichever it is."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from shared.data import tokenizer_backends as module
from shared.data.tokenizer_backends import (
    Fast,
    Reference,
    beginning,
    choice_without_comparing,
    compare,
    first_difference,
    verdict,
)
from shared.errors import UserError

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


def _choose(
    kind: str, texts: Iterable[str], wanted: str = "auto", compared: Callable[..., module.Compared] = compare
) -> module.Choice:
    known = choice_without_comparing(wanted, 1 << 30)
    return known or verdict(compared(kind, batch) for batch in beginning(texts))


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
    small = choice_without_comparing("auto", 1000)
    assert small is not None
    assert (small.name, "too little" in small.reason) == ("tokenizers", True)


def test_only_the_beginning_is_compared_and_errors_of_reading_pass(
    kinds: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMPARED_BYTES", 1000)

    def texts() -> Any:
        yield from ["x" * 100] * 10
        raise UserError("not read")

    assert _choose(kinds["ours"], texts()).compared_bytes == 1000
    monkeypatch.setattr(module, "COMPARED_BYTES", 1001)
    with pytest.raises(UserError, match="not read"):
        _choose(kinds["ours"], texts())


def test_one_difference_is_the_verdict_and_nothing_more_is_compared(kinds: dict[str, str]) -> None:
    seen = []

    def compared(kind: str, batch: list[str]) -> module.Compared:
        seen.append(len(batch))
        return compare(kind, batch) if len(seen) < 3 else module.Compared(problem="the third differs")

    choice = _choose(kinds["ours"], ["x" * 600_000] * 12, compared=compared)
    assert (choice.name, choice.reason, choice.compared_bytes) == ("tokenizers", "the third differs", 0)
    assert seen == [2, 2, 2]
    assert verdict([]).name == "tokenizers", "nothing was compared"


def test_a_tokenizer_that_was_opened_early_is_not_opened_again(kinds: dict[str, str], tmp_path: Path) -> None:
    """transformers adds a post-processor to what tokenizer.json says; no back end is asked for that."""
    file = tmp_path / "tokenizer.json"
    file.write_text(kinds["gpt2"])
    module.warm_up(file, ("fastokens", "tokenizers"))
    template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [
        {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {}}  # fmt: skip
    opened = json.dumps(json.loads(kinds["gpt2"]) | {"post_processor": template})
    misses = [each.cache_info().misses for each in (module._fast_tokenizer, module._reference_tokenizer)]
    assert first_difference(Fast(opened), Reference(opened), TEXTS) is None
    assert [each.cache_info().misses for each in (module._fast_tokenizer, module._reference_tokenizer)] == misses
    other = json.loads(opened)
    del other["added_tokens"][-1]
    ids, _ = Reference(json.dumps(other)).encode(["<|not special|>"])
    assert len(ids) > 1, "another tokenizer is opened for itself"
    module.warm_up(tmp_path / "none.json", ("fastokens",))  # what is wrong is told by who opens it for use


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
