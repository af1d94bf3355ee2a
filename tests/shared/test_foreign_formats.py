"""Paths that are no directory of a checkpoint: hub ids, URLs, single files."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.foreign_formats import FORMATS, absent, foreign_format, not_a_directory


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (
            "Qwen/Qwen2.5-0.5B",
            "if it is a model on the Hugging Face hub, `hf download Qwen/Qwen2.5-0.5B --local-dir DIR`",
        ),
        ("https://huggingface.co/a/b", "is a URL; `hf download a/b --local-dir DIR`"),
        ("https://huggingface.co/a/b/tree/main", "is a URL; `hf download a/b --local-dir DIR`"),
        ("hf://a/b", "is a URL; download it"),
        ("s3://bucket/model", "is a URL; download it"),
    ],
)
def test_where_a_model_on_the_network_is_named(typed: str, says: str) -> None:
    assert says in absent(Path(typed))


@pytest.mark.parametrize("typed", ["gpt2", "/a/b", "./a/b/c", "../a", "here/mistyped", "a/b/c"])
def test_a_wrong_path_is_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absent(Path(typed)) == "does not exist"


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.title)
def test_a_single_file_of_every_format(tmp_path: Path, kind: object) -> None:
    for pattern in kind.names:  # type: ignore[attr-defined]
        said = not_a_directory(tmp_path / pattern.replace("*", "1"))
        assert kind.title in said  # type: ignore[attr-defined]
        assert said.endswith(kind.fix)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "pytorch_model.bin"])
def test_a_file_of_a_directory_that_is_read(tmp_path: Path, name: str) -> None:
    assert not_a_directory(tmp_path / name).endswith(f"give the one that holds it, {tmp_path}")


def test_no_name_of_a_directory_that_is_read_is_foreign() -> None:
    names = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "config.json",
        "tokenizer.model",
    ]
    assert foreign_format([*names, "model.safetensors.index.json", "release", "hf", "README.md", "params.json"]) is None
