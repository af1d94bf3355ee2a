"""The tokens around a document, by the special tokens of published tokenizers."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from shared.data.document_tokens import DocumentTokens
from shared.errors import UserError


def tokenizer(special: str, eos: str | None, bos: str | None = None, *, adds_bos: bool = False) -> Any:
    """A tokenizer of one letter and special tokens."""
    words = ["a", *special.split()]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    inner.add_special_tokens(special.split())
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(str(bos), words.index(str(bos)))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, bos_token=bos)


QWEN = "<|endoftext|> <|im_start|> <|im_end|>"
LLAMA = "<|begin_of_text|> <|end_of_text|> <|eot_id|>"


@pytest.mark.parametrize(
    ("special", "eos", "bos", "adds_bos", "expected"),
    [
        (QWEN, "<|endoftext|>", None, False, (None, "<|endoftext|>")),  # Qwen3 base
        (QWEN, "<|im_end|>", None, False, (None, "<|endoftext|>")),  # Qwen3
        (LLAMA, "<|end_of_text|>", "<|begin_of_text|>", True, ("<|begin_of_text|>", "<|end_of_text|>")),  # Llama 3
        (LLAMA, "<|eot_id|>", "<|begin_of_text|>", True, ("<|begin_of_text|>", "<|end_of_text|>")),  # Llama 3 Instruct
        ("<bos> <eos> <end_of_turn>", "<eos>", "<bos>", True, ("<bos>", "<eos>")),  # Gemma
        ("<|endoftext|> <|return|> <|end|>", "<|return|>", None, False, (None, "<|endoftext|>")),  # gpt-oss
        ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", False, (None, "<|endoftext|>")),  # GPT-2
        ("<|im_end|>", "<|im_end|>", None, False, (None, "<|im_end|>")),  # nothing better in the vocabulary
    ],
)
def test_defaults_follow_the_tokenizer(
    special: str, eos: str, bos: str | None, adds_bos: bool, expected: tuple[str | None, str]
) -> None:
    found = DocumentTokens.of(tokenizer(special, eos, bos, adds_bos=adds_bos), None, None)
    assert (found.begin, found.end) == expected
    words = ["a", *special.split()]
    assert found.end_id == words.index(found.end)
    assert found.begin_id == (None if found.begin is None else words.index(found.begin))
    assert (f"the eos token {eos} ends a turn of a chat" in str(found)) == (eos != found.end)


def test_what_is_asked_for_wins() -> None:
    llama = tokenizer(LLAMA, "<|eot_id|>", "<|begin_of_text|>", adds_bos=True)
    found = DocumentTokens.of(llama, "<|eot_id|>", False)
    assert (found.begin, found.end) == (None, "<|eot_id|>")
    assert str(found) == "each document ends with <|eot_id|> (3): --end-of-document, --no-bos"


@pytest.mark.parametrize(
    ("eos", "end", "bos", "says"),
    [
        (None, None, None, "--tokenizer has no eos_token .* name the token that ends documents with --end-of-document"),
        ("<|endoftext|>", None, True, "--bos: the tokenizer names no bos_token"),
        (
            "<|endoftext|>",
            "</s>",
            None,
            "--end-of-document </s>: no token of the tokenizer; its ends .*: <|endoftext|>",
        ),
    ],
)
def test_tokens_that_are_not_there_are_named(eos: str | None, end: str | None, bos: bool | None, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("|", r"\|")):
        DocumentTokens.of(tokenizer(QWEN, eos), end, bos)
    if eos is None:
        assert DocumentTokens.of(tokenizer(QWEN, eos), "<|endoftext|>", None).end == "<|endoftext|>"
