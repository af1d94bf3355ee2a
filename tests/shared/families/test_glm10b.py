from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.architecture.architecture import PrefixLM
from shared.errors import UserError
from shared.families import registry

IDS = {"<|startofpiece|>": 50257, "<|endofpiece|>": 50258, "[MASK]": 50260, "[gMASK]": 50263, "[sMASK]": 50264}


def folder(path: Path, tokens: dict[str, int] | None, **changes: Any) -> Path:
    """A model whose config.json says no token, as published."""
    config = registry.to_config(registry.sizes()["glm-10b"])
    config = {name: value for name, value in config.items() if not name.endswith("_token_id")}
    (path / "config.json").write_text(json.dumps(config | changes))
    if tokens is not None:
        (path / "added_tokens.json").write_text(json.dumps(tokens))
    return path


def test_tokens_are_read_beside_the_configuration(tmp_path: Path) -> None:
    assert registry.from_files(folder(tmp_path, IDS)) == registry.sizes()["glm-10b"]


def test_the_configuration_goes_first_and_null_says_nothing(tmp_path: Path) -> None:
    read = registry.from_files(folder(tmp_path, IDS, sop_token_id=9, mask_token_id=None)).prefix
    assert read == PrefixLM(start_token=9, blank_tokens=(50260, 50264, 50263), earliest=True, position_streams=2)


def test_models_with_one_kind_of_blank(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<mask>"}))
    read = registry.from_files(folder(tmp_path, {"<|startofpiece|>": 50265, "<mask>": 50264, "[MASK]": 3})).prefix
    blank = PrefixLM(start_token=50265, blank_tokens=(50264,), earliest=True, position_streams=2)
    assert read == blank


@pytest.mark.parametrize("tokens", [None, {"[MASK]": 50260}, {"<|startofpiece|>": 50257}])
def test_without_the_tokens_nothing_is_computed(tmp_path: Path, tokens: dict[str, int] | None) -> None:
    with pytest.raises(
        UserError, match=r"no tokenizer is in its directory .* put the published tokenizer's files there"
    ):
        registry.from_files(folder(tmp_path, tokens))


def test_a_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json: token id 60000 is out of range: vocab_size is 50304"):
        registry.from_files(folder(tmp_path, IDS | {"[sMASK]": 60_000}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_position_encoding": False}, "block_position_encoding = False is not supported"),
        ({"relative_encoding": True}, "relative_encoding = True is not supported"),
        ({"spell_length": 10}, "spell_length = 10 is not supported: prompt tuning"),
        ({"output_predict": False}, "output_predict = False is not supported"),
        (
            {"layernorm_epsilon": 1e-12},
            "layernorm_epsilon = 1e-12 is not supported: the published class always uses 1e-5",
        ),
        ({"architectures": ["GLMForSequenceClassification"]}, "supported: GLMForConditionalGeneration"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.from_files(folder(tmp_path, IDS, **changes))


def test_a_scale_that_is_taken_back_changes_nothing(tmp_path: Path) -> None:
    assert registry.from_files(folder(tmp_path, IDS, attention_scale=8.0)) == registry.sizes()["glm-10b"]


def test_its_namesake_is_another_family() -> None:
    theirs = registry.to_config(registry.sizes()["glm-4-9b"])
    assert registry.family_of(theirs).name == "glm"
    ours = registry.to_config(registry.sizes()["glm-10b"])
    assert ours["model_type"] == theirs["model_type"]
    assert registry.family_of(ours).name == "glm10b"
