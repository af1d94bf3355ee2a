"""Vocabulary sizes and special tokens from tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import UserError
from tools.convert.tokenizer_files import tokenizer_fields


def write(folder: Path, model: Any, added: list[dict[str, Any]], settings: dict[str, Any]) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_size_is_one_more_than_the_largest_id(tmp_path: Path) -> None:
    """Ids may have gaps: the embedding needs a row for the largest."""
    folder = write(tmp_path, {"vocab": {"a": 0, "b": 1}}, [{"id": 9, "content": "<s>"}], {"bos_token": "<s>"})
    assert tokenizer_fields(folder) == {"vocab_size": 10, "bos_token_id": 9, "eos_token_id": None, "pad_token_id": None}


def test_unigram_vocabulary_is_a_list(tmp_path: Path) -> None:
    folder = write(tmp_path, {"vocab": [["<unk>", 0.0], ["a", -1.0], ["</s>", -2.0]]}, [], {"eos_token": "</s>"})
    assert tokenizer_fields(folder)["vocab_size"] == 3
    assert tokenizer_fields(folder)["eos_token_id"] == 2


def test_special_token_that_is_not_there(tmp_path: Path) -> None:
    folder = write(tmp_path, {"vocab": {"a": 0}}, [], {"eos_token": "<eos>"})
    with pytest.raises(UserError, match="eos_token '<eos>' is not in"):
        tokenizer_fields(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}', '{"model": {"vocab": {}}}'])
def test_damaged_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        tokenizer_fields(tmp_path)
