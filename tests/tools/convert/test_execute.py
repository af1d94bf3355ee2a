"""The number of workers and of shards changes nothing in the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.checkpoint import blocks, torch_dist_writer

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in as many blocks and files as a large one."""
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    monkeypatch.setattr(torch_dist_writer, "_SMALLEST", 40_000)
    monkeypatch.setattr("tools.convert.transfer.CHUNK_BYTES", 7000)


def files(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def manifest(directory: Path) -> dict[str, Any]:
    content = json.loads((directory / "manifest.json").read_text())
    return {name: value for name, value in content.items() if name not in ("options", "created", "parents", "identity")}


@pytest.mark.parametrize("variant", ["llama-rope-llama3-sharded", "llama-tied-head-stored", "llama-one-fp32-layer"])
def test_workers_and_shards_give_the_same_directory(make_hf: Make, convert: Any, tmp_path: Path, variant: str) -> None:
    source = make_hf(variant)
    for name, workers in (("a", 1), ("b", 5)):
        assert convert("to-megatron", "--source", source, "--target", tmp_path / name, "--workers", workers).code == 0
    for shard in ("2/3", "1/3", "3/3", "publish/3"):
        answer = convert("to-megatron", "--source", source, "--target", tmp_path / "c", "--shard", shard)
        assert answer.code == 0, answer.err
        assert (tmp_path / "c").exists() == (shard == "publish/3")
    assert len(list((tmp_path / "a" / "release").glob("*.distcp"))) >= 4
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")
    assert manifest(tmp_path / "a") == manifest(tmp_path / "b") == manifest(tmp_path / "c")

    assert convert("to-hf", "--source", tmp_path / "a", "--target", tmp_path / "one", "--workers", 1).code == 0
    assert convert("to-hf", "--source", tmp_path / "a", "--target", tmp_path / "many", "--workers", 6).code == 0
    for shard in ("1/2", "2/2", "publish/2"):
        answer = convert("to-hf", "--source", tmp_path / "a", "--target", tmp_path / "back", "--shard", shard)
        assert answer.code == 0, answer.err
    assert files(tmp_path / "one") == files(tmp_path / "many") == files(tmp_path / "back") == files(source)
    assert manifest(tmp_path / "one") == manifest(tmp_path / "many") == manifest(tmp_path / "back")
    assert not list(tmp_path.glob("*.shards-of-*"))
    assert not list(tmp_path.glob("*.partial-*"))


def test_shards_of_other_options_are_not_published(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    convert("to-megatron", "--source", make_hf("llama-rope-llama3-sharded"), "--target", tmp_path / "m")
    words = ("to-hf", "--source", tmp_path / "m", "--target", tmp_path / "back")
    assert convert(*words, "--shard", "1/2").code == 0
    assert convert(*words, "--shard", "2/2", "--dtype", "fp32").code == 0
    answer = convert(*words, "--shard", "publish/2")
    assert answer.code == 2
    assert "shard 2 of 2 was written with --dtype fp32, not unset" in answer.err
    assert not (tmp_path / "back").exists()
    answer = convert(*words)
    assert answer.code == 2
    assert "holds parts of a conversion in 2 shards" in answer.err
    assert convert(*words, "--shard", "2/2").code == 0
    assert convert(*words, "--shard", "publish/2").code == 0
    assert convert(*words).code == 0  # the same work, already done


@pytest.mark.parametrize("shard", [None, "2/2"])
def test_a_flipped_byte_in_the_source_publishes_nothing(
    make_hf: Make, convert: Any, tmp_path: Path, shard: str | None
) -> None:
    """Content is checked while it is copied; a shard checks what it reads."""
    convert("to-megatron", "--source", make_hf("llama-rope-llama3-sharded"), "--target", tmp_path / "m")
    file = sorted((tmp_path / "m" / "release").glob("*.distcp"))[-1]
    data = bytearray(file.read_bytes())
    data[2000] ^= 1
    file.write_bytes(data)
    words = ("--shard", shard) if shard else ()
    answer = convert("to-hf", "--source", tmp_path / "m", "--target", tmp_path / "back", *words)
    assert answer.code == 2, answer
    assert f"{file} is damaged" in answer.err
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["hf", "m"]


def test_a_flipped_byte_in_the_output_is_found_by_the_reader(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    """In both forms: the manifest has the hash of what was meant to be written."""
    convert("to-megatron", "--source", make_hf(), "--target", tmp_path / "m")
    convert("to-hf", "--source", tmp_path / "m", "--target", tmp_path / "h")
    for name, command, pattern in (("m", "to-hf", "release/*.distcp"), ("h", "to-megatron", "*.safetensors")):
        for file in (tmp_path / name).glob(pattern):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 4
            file.write_bytes(data)
            answer = convert(command, "--source", tmp_path / name, "--target", tmp_path / "again")
            assert answer.code == 2
            assert f"{file} is damaged" in answer.err
            assert not (tmp_path / "again").exists()
            data[len(data) // 2] ^= 4
            file.write_bytes(data)


def test_the_plan_says_how_many_workers(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    answer = convert("to-megatron", "--source", make_hf(), "--target", tmp_path / "m", "--workers", "3")
    assert "3 workers" in answer.err
    assert convert("to-megatron", "--source", tmp_path / "hf", "--target", tmp_path / "n", "--workers", "0").code == 2
