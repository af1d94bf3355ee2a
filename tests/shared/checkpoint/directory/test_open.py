from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.checkpoint.directory.open import open_checkpoint, verify_content
from shared.errors import AlreadyDone, UserError


def test_a_published_directory_opens_with_its_facts(published: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(published(), kinds=("hf",), flag="--source")
    assert (checkpoint.kind, checkpoint.facts["family"]) == ("hf", "llama")
    assert checkpoint.hf_files == checkpoint.path


@pytest.mark.parametrize("position", [0, 2500, 4999])
def test_one_flipped_bit_is_found_and_named(published: Callable[..., Path], position: int) -> None:
    weights = published() / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[position] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        open_checkpoint(weights.parent, kinds=("hf",), flag="--source")
    open_checkpoint(weights.parent, kinds=("hf",), flag="--source", verify="sizes")


def test_missing_short_and_stray_files_are_named(published: Callable[..., Path]) -> None:
    target = published()
    stray = target / "model-00002.safetensors"
    stray.write_bytes(b"")
    with pytest.raises(UserError, match="weights of unknown origin"):
        open_checkpoint(target, kinds=("hf",), flag="--source")
    stray.unlink()
    (target / "model.safetensors").write_bytes(b"0" * 4000)
    with pytest.raises(UserError, match="has 4000 bytes instead of 5000"):
        open_checkpoint(target, kinds=("hf",), flag="--source")
    (target / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        open_checkpoint(target, kinds=("hf",), flag="--source")


@pytest.mark.parametrize("edit", ["rewritten", "removed", "added"])
@pytest.mark.parametrize("place", ["", "hf/"])
def test_a_user_may_edit_the_model_card_and_nothing_else(published: Callable[..., Path], edit: str, place: str) -> None:
    card = "" if edit == "added" else f"{place}README.md"
    target = published(others=("LICENSE", *filter(None, [card])))
    if edit == "removed":
        (target / card).unlink()
    else:
        (target / place).mkdir(exist_ok=True)
        (target / place / "README.md").write_text("Measured by hand, and longer than before.")
    opened = open_checkpoint(target, kinds=("hf",), flag="--source")
    verify_content(opened, flag="--source")
    with pytest.raises(AlreadyDone):  # the same command does not write it again
        published(others=("LICENSE", *filter(None, [card])))
    (target / "LICENSE").write_text("Mine")
    with pytest.raises(UserError, match="LICENSE has 4 bytes instead of 7"):
        open_checkpoint(target, kinds=("hf",), flag="--source")


def test_a_file_named_like_the_card_elsewhere_is_compared(published: Callable[..., Path]) -> None:
    target = published(others=("nested/README.md",))
    (target / "nested/README.md").write_text("edited by hand..")
    with pytest.raises(UserError, match=r"nested/README.md is damaged"):
        open_checkpoint(target, kinds=("hf",), flag="--source")


def test_a_newer_contract_is_refused_by_name(published: Callable[..., Path]) -> None:
    path = published() / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"contract_version": 99}))
    with pytest.raises(UserError, match="contract_version 99"):
        open_checkpoint(path.parent, kinds=("hf",), flag="--source")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"contract_version": 1}'])
def test_a_damaged_manifest_is_refused(published: Callable[..., Path], text: str) -> None:
    path = published() / "manifest.json"
    path.write_text(text)
    with pytest.raises(UserError, match="damaged"):
        open_checkpoint(path.parent, kinds=("hf",), flag="--source")


@pytest.mark.parametrize("name", ["../stray.txt", "/etc/hostname", "a/../../stray.txt"])
def test_a_manifest_of_files_elsewhere_is_refused(published: Callable[..., Path], name: str) -> None:
    """Files that it lists travel on: a stranger's directory must not choose what is read and written outside of it."""
    path = published() / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][name] = {"size": 0, "hash": "xxh3_128:0"}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"is damaged at files: .* is not below the directory"):
        open_checkpoint(path.parent, kinds=("hf",), flag="--source")


def test_the_wrong_kind_is_named(published: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="is a hf directory; wanted: megatron"):
        open_checkpoint(published(), kinds=("megatron",), flag="--source")


def test_foreign_hf_directory_must_have_the_shards_its_index_names(source: Path) -> None:
    assert open_checkpoint(source, kinds=("hf",), flag="--source").manifest is None
    (source / "model.safetensors").rename(source / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-2.safetensors is missing"):
        open_checkpoint(source, kinds=("hf",), flag="--source")
    (source / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="not a weight index"):
        open_checkpoint(source, kinds=("hf",), flag="--source")


def test_foreign_directories_without_weights_are_refused(tmp_path: Path, source: Path) -> None:
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        open_checkpoint(source, kinds=("hf",), flag="--source")
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_checkpoint(tmp_path, kinds=("hf",), flag="--source")
    with pytest.raises(UserError, match="not a directory"):
        open_checkpoint(tmp_path / "nowhere", kinds=("hf",), flag="--source")


@pytest.mark.parametrize(("tracker", "folder"), [("release", "release"), ("100", "iter_0000100")])
def test_foreign_megatron_directory_follows_its_tracker(tmp_path: Path, tracker: str, folder: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    with pytest.raises(UserError, match=r"\.metadata is missing"):
        open_checkpoint(tmp_path, kinds=("megatron",), flag="--source")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / ".metadata").write_bytes(b"")
    checkpoint = open_checkpoint(tmp_path, kinds=("megatron",), flag="--source")
    assert checkpoint.iteration_path == tmp_path / folder
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(UserError, match="names no iteration"):
        open_checkpoint(tmp_path, kinds=("megatron",), flag="--source")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 17209961\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>\n"


@pytest.mark.parametrize(
    "content", [POINTER, POINTER.replace("git-lfs.github.com", "hawser.github.com"), PAGE, "Entry not found"]
)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "model.safetensors",
        "deep/notes.json",
        "generation_config.json",
    ],
)
def test_a_file_that_stands_for_another_is_named(source: Path, name: str, content: str) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text(content)
    what = "git-lfs pointer.*git lfs pull" if "oid" in content else "answer of a web server"
    with pytest.raises(UserError, match=f"^--source {source / name} is .*{what}"):
        open_checkpoint(source, kinds=("hf",), flag="--source")


@pytest.mark.parametrize("name", ["nested/a.txt", "model.safetensors", "manifest.json"])
def test_a_pointer_in_a_published_directory_is_named_not_its_size(published: Callable[..., Path], name: str) -> None:
    file = published() / name
    file.write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is a git-lfs pointer"):
        open_checkpoint(file.parents[name.count("/")], kinds=("hf",), flag="--source", verify="sizes")


@pytest.mark.parametrize("name", ["hf/tokenizer.json", "iter_0000100/.metadata", "iter_0000100/__0_0.distcp"])
def test_a_pointer_in_a_megatron_directory_is_named(tmp_path: Path, name: str) -> None:
    for made in ("hf/tokenizer.json", "iter_0000100/.metadata", "iter_0000100/__0_0.distcp"):
        (tmp_path / made).parent.mkdir(exist_ok=True)
        (tmp_path / made).write_text("{}" if made != name else POINTER)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    with pytest.raises(UserError, match=f"{name} is a git-lfs pointer"):
        open_checkpoint(tmp_path, kinds=("megatron",), flag="--source")


def test_weights_that_are_not_read_may_be_pointers(source: Path) -> None:
    (source / "pytorch_model.bin").write_text(POINTER)
    open_checkpoint(source, kinds=("hf",), flag="--source")
    (source / "model.safetensors").write_text(POINTER)
    open_checkpoint(source, kinds=("tokenizer", "hf", "megatron"), flag="--tokenizer")
    (source / "tokenizer.json").write_text(POINTER)
    with pytest.raises(UserError, match="tokenizer.json is a git-lfs pointer"):
        open_checkpoint(source, kinds=("tokenizer", "hf", "megatron"), flag="--tokenizer")
