"""Auxiliary files, and directories completed for transformers 4 and 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.checkpoint.directory.auxiliary_files import (
    auxiliary_files,
    copy_auxiliary_files,
    finish_hf_directory,
    for_transformers_4_and_5,
    unread_weights,
)
from shared.errors import UserError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_everything_but_weights_is_auxiliary(tmp_path: Path) -> None:
    kept = ["LICENSE", "config.json", "extra/note.txt", "metrics.jsonl", "tokenizer.model", ".gitattributes"]
    left = ["model.safetensors", "model.safetensors.index.json", "original/a.pth", "weights.json", ".cache/x"]
    folder = make(tmp_path / "a", *kept, *left)
    assert [path.as_posix() for path in auxiliary_files(folder)] == sorted(kept)
    assert unread_weights(folder, {"model.safetensors", "model.safetensors.index.json"}) == ["original/"]
    copy_auxiliary_files(folder, tmp_path / "b")
    assert sorted(
        p.relative_to(tmp_path / "b").as_posix() for p in (tmp_path / "b").rglob("*") if p.is_file()
    ) == sorted(kept)


def test_what_a_trainer_left_is_neither_auxiliary_nor_read(tmp_path: Path) -> None:
    trainers = ["checkpoint-5/trainer_state.json", "global_step7/a.pt", "iter_0000009/common.pt"]
    folder = make(tmp_path / "a", "config.json", "checkpoints.md", *trainers)
    (folder / "latest").write_text("global_step7")
    (folder / "latest_checkpointed_iteration.txt").write_text("9")
    assert [path.as_posix() for path in auxiliary_files(folder)] == ["checkpoints.md", "config.json"]
    assert unread_weights(folder, set()) == ["checkpoint-5/", "global_step7/", "iter_0000009/"]


def test_of_a_published_directory_what_its_manifest_lists(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "config.json", "metrics.jsonl", "state/optimizer.json", "stray.txt")
    (folder / "manifest.json").write_text(
        json.dumps({"files": {"config.json": {}, "metrics.jsonl": {}, "state/optimizer.json": {}}})
    )
    assert [path.as_posix() for path in auxiliary_files(folder)] == ["config.json"]


def test_the_card_of_a_published_directory_is_copied_as_the_user_left_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "config.json", "README.md")
    (folder / "manifest.json").write_text(json.dumps({"files": {"config.json": {}}}))
    copy_auxiliary_files(folder, tmp_path / "added")
    assert (tmp_path / "added/README.md").read_text() == "README.md"
    (folder / "manifest.json").write_text(json.dumps({"files": {"config.json": {}, "README.md": {}}}))
    (folder / "README.md").unlink()
    copy_auxiliary_files(folder, tmp_path / "removed")
    assert [path.name for path in (tmp_path / "removed").iterdir()] == ["config.json"]


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    source, target = make(tmp_path / "a", "config.json"), make(tmp_path / "b", "config.json")
    (target / "config.json").write_text("mine")
    copy_auxiliary_files(source, target)
    assert (target / "config.json").read_text() == "mine"


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rope_theta": 5.0, "rope_scaling": None}),
        ({"rope_parameters": {"rope_theta": 5.0, **LINEAR}}, {"rope_theta": 5.0, "rope_scaling": LINEAR}),
        (
            {"rope_theta": 5.0},
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}, "rope_scaling": None},
        ),
        (
            {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 5.0, **LINEAR}},
        ),
        ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        # null is no spelling
        (
            {"rope_theta": None, "rope_scaling": None, "rope_parameters": {"rope_theta": 5.0, **LINEAR}},
            {"rope_theta": 5.0, "rope_scaling": LINEAR},
        ),
        ({"rope_theta": None}, {}),
        (
            {"rope_theta": 5.0, "rope_parameters": None},
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}, "rope_scaling": None},
        ),
        ({"dtype": None, "torch_dtype": "float16"}, {"dtype": "float16"}),
        ({"dtype": "float16", "torch_dtype": None}, {"torch_dtype": "float16"}),
        ({"vocab_size": 3}, {}),
    ],
)
def test_fields_of_transformers_4_and_5(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert for_transformers_4_and_5(config) == config | expected
    assert for_transformers_4_and_5(for_transformers_4_and_5(config)) == for_transformers_4_and_5(config)


def test_finish_hf_directory(tmp_path: Path) -> None:
    source = make(tmp_path / "a", "config.json", "chat_template.jinja", "model.safetensors", "tokenizer.json")
    target = make(tmp_path / "b", "model.safetensors")
    (target / "config.json").write_text(json.dumps({"rope_parameters": {"rope_theta": 5.0}, "dtype": "float32"}))
    (target / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend", "eos_token": "é"}')
    finish_hf_directory(target, source)
    config = json.loads((target / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (5.0, "float32")
    assert (target / "chat_template.jinja").is_file()
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "é"}


def test_finish_hf_directory_without_any_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json is missing"):
        finish_hf_directory(make(tmp_path / "b", "model.safetensors"), make(tmp_path / "a", "tokenizer.json"))
