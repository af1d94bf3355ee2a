"""Token ids against transformers' tokenizers, for every kind of published tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.families.common.token_ids import mask_token, token_ids

ADDED = ["[gMASK]", "<|startofpiece|>"]


@pytest.mark.parametrize("version", [4, 5])
def test_of_bert(tmp_path: Path, version: int) -> None:
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]) + "\n")
    if version == 4:  # which wrote what was added to it into a file of its own
        (tmp_path / "added_tokens.json").write_text(json.dumps({token: 7 + i for i, token in enumerate(ADDED)}))
        tokenizer = BertTokenizer.from_pretrained(tmp_path)
    else:
        tokenizer = BertTokenizer.from_pretrained(tmp_path)
        tokenizer.add_tokens(ADDED)
        tokenizer.save_pretrained(tmp_path)
        assert "[gMASK]" in (tmp_path / "tokenizer.json").read_text()
    known = token_ids(tmp_path)
    for token in ("[MASK]", *ADDED):
        assert known[token] == tokenizer.convert_tokens_to_ids(token), token
    assert mask_token(tmp_path) == tokenizer.mask_token


def test_of_roberta(tmp_path: Path) -> None:
    from transformers import RobertaTokenizer

    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "<mask>": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "<mask>", "lstrip": True}}))
    decoder = {str(6 + i): {"content": token, "special": True} for i, token in enumerate(ADDED)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer = RobertaTokenizer.from_pretrained(tmp_path)
    known = token_ids(tmp_path)
    for token in ("<mask>", *ADDED):
        assert known[token] == tokenizer.convert_tokens_to_ids(token), token
    assert mask_token(tmp_path) == tokenizer.mask_token


def test_of_no_tokenizer_and_of_a_broken_one(tmp_path: Path) -> None:
    assert token_ids(tmp_path) == {}
    assert mask_token(tmp_path) == "[MASK]"
    (tmp_path / "added_tokens.json").write_text("{")
    with pytest.raises(UserError, match="added_tokens.json is not JSON"):
        token_ids(tmp_path)
