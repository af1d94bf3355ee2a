"""Long texts in stretches: ids of the whole, and the memory of a stretch."""

import io
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from shared.data import stretches as module
from shared.data.stretches import RULES, cut_of, file_stretches, stretches
from shared.errors import UserError

TEXT = "It was a day like  any other.\n\nOr so\nthey say: \u00e9t\u00e9 1999, the end\n\t of it all.\n" * 40


def _bpe(*steps: pre_tokenizers.PreTokenizer) -> Tokenizer:
    from tokenizers import trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _ours() -> Tokenizer:
    from tools.pretrain.train_bpe import train

    return train(iter([TEXT]), 400)


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize("name", ["ours", "gpt2", "digits"])
@pytest.mark.parametrize("size", [3, 50, 1000])
def test_stretches_give_the_ids_of_the_whole(name: str, size: int) -> None:
    made = {"ours": _ours, "gpt2": lambda: _bpe(GPT2), "digits": lambda: _bpe(pre_tokenizers.Digits(True), GPT2)}
    tokenizer = made[name]()
    cut = cut_of(tokenizer)
    assert cut == ("|".join(RULES) if name == "ours" else RULES[1])  # GPT-2's \s+(?!\S) sees what follows line ends
    found = list(stretches(TEXT, cut, size))
    assert "".join(found) == TEXT
    assert len(found) > len(TEXT) / (size + 60)
    assert [i for part in found for i in tokenizer.encode(part).ids] == tokenizer.encode(TEXT).ids
    read = list(file_stretches(io.BytesIO(b"\xef\xbb\xbf" + TEXT.encode()), Path("x"), cut, size))
    assert [i for part in read for i in tokenizer.encode(part).ids] == tokenizer.encode(TEXT).ids
    assert len(read) > len(TEXT) / (size + 70)


def test_no_place_is_taken_that_a_token_spans_or_where_a_space_is_put_before_texts() -> None:
    words = {"[UNK]": 0, "\u2581a": 1, "a": 2, "\n": 3}
    spaced = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    spaced.normalizer = normalizers.Prepend("\u2581")
    spaced.pre_tokenizer = pre_tokenizers.Split("a", "isolated")
    assert cut_of(spaced) is None
    lines = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    lines.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    assert cut_of(lines) == RULES[0]
    over = Tokenizer(models.WordLevel(words | {"\u010aa": 4}, unk_token="[UNK]"))
    over.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    assert cut_of(over) is None


def test_text_that_is_none_and_bytes_that_are_not_utf8_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"page:3: not UTF-8 \(byte 0xe9\)"):
        list(file_stretches(io.BytesIO(b"one\ntwo\nthr\xe9e\n"), Path("page"), RULES[1], 4))
    monkeypatch.setattr(module, "STRETCH_LIMIT", 100)
    with pytest.raises(UserError, match=r"page:2: .* without a space between words"):
        list(file_stretches(io.BytesIO(b"one\n" + b"x" * 200), Path("page"), RULES[1], 10))
    with pytest.raises(UserError, match=re.escape("page:1: not UTF-8")):
        list(file_stretches(io.BytesIO(b"cut \xc3"), Path("page"), RULES[1], 10))
