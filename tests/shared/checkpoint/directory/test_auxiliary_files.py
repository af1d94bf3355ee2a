"""What travels with the weights, and a directory that any program loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.checkpoint.directory.auxiliary_files import (
    both_spellings,
    complete_hf,
    copy_passengers,
    other_weights,
    passengers,
)
from shared.errors import UserError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_everything_but_weights_travels(tmp_path: Path) -> None:
    kept = ["LICENSE", "config.json", "extra/note.txt", "metrics.jsonl", "tokenizer.model", ".gitattributes"]
    left = ["model.safetensors", "model.safetensors.index.json", "original/a.pth", "weights.json", ".cache/x"]
    folder = make(tmp_path / "a", *kept, *left)
    assert [path.as_posix() for path in passengers(folder)] == sorted(kept)
    assert other_weights(folder, {"model.safetensors"}) == ["original/a.pth"]
    copy_passengers(folder, tmp_path / "b")
    assert sorted(
        p.relative_to(tmp_path / "b").as_posix() for p in (tmp_path / "b").rglob("*") if p.is_file()
    ) == sorted(kept)


def test_of_a_published_directory_what_its_manifest_answers_for(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "config.json", "metrics.jsonl", "state/optimizer.json", "stray.txt")
    (folder / "manifest.json").write_text(
        json.dumps({"files": {"config.json": {}, "metrics.jsonl": {}, "state/optimizer.json": {}}})
    )
    assert [path.as_posix() for path in passengers(folder)] == ["config.json"]


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    source, target = make(tmp_path / "a", "config.json"), make(tmp_path / "b", "config.json")
    (target / "config.json").write_text("mine")
    copy_passengers(source, target)
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
        ({"vocab_size": 3}, {}),
    ],
)
def test_both_spellings(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert both_spellings(config) == config | expected
    assert both_spellings(both_spellings(config)) == both_spellings(config)


def test_complete_hf(tmp_path: Path) -> None:
    source = make(tmp_path / "a", "config.json", "chat_template.jinja", "model.safetensors", "tokenizer.json")
    target = make(tmp_path / "b", "model.safetensors")
    (target / "config.json").write_text(json.dumps({"rope_parameters": {"rope_theta": 5.0}, "dtype": "float32"}))
    (target / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend", "eos_token": "é"}')
    complete_hf(target, source)
    config = json.loads((target / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (5.0, "float32")
    assert (target / "chat_template.jinja").is_file()
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "é"}


def test_complete_hf_without_any_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json is missing"):
        complete_hf(make(tmp_path / "b", "model.safetensors"), make(tmp_path / "a", "tokenizer.json"))
