"""Sharded checkpoints: read by index, written back identically, refused if incomplete."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.formats.hugging_face import INDEX, HfReader, WeightLayout, default_layout, write_weights
from shared.errors import UserError

TENSORS = {f"t{i}": np.full((4, 8), i, dtype=np.float32) for i in range(5)}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Three shards, in an order that is not alphabetical, with an index of odd spacing."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weight_map = {}
    for number, names in enumerate((["t3", "t0"], ["t1"], ["t4", "t2"]), 1):
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: TENSORS[name] for name in names}, folder / file, metadata={"format": "pt", "by": "hand"})
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 640}, "weight_map": weight_map}, indent=3))
    return folder


def content(reader: HfReader, name: str) -> bytes:
    return b"".join(map(bytes, reader.rows(name)))


def test_tensors_and_rows(sharded: Path) -> None:
    reader = HfReader(sharded)
    assert set(reader.tensors) == set(TENSORS)
    assert content(reader, "t2") == TENSORS["t2"].tobytes()
    assert b"".join(map(bytes, reader.rows("t2", 1, 2))) == TENSORS["t2"][1:3].tobytes()
    assert (reader.bytes, reader.parameters) == (640, 160)


def test_written_back_from_its_layout_it_is_the_same_bytes(sharded: Path, tmp_path: Path) -> None:
    reader = HfReader(sharded)
    (tmp_path / "weights.json").write_text(reader.layout.encode())
    layout = WeightLayout.read(tmp_path / "weights.json")
    (tmp_path / "back").mkdir()
    hashes: dict[str, str] = {}
    write_weights(tmp_path / "back", layout, lambda t: reader.rows(t.name), hashes.__setitem__)
    for path in sharded.iterdir():
        if path.name != "config.json":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    assert set(hashes) == {p.name for p in sharded.glob("*.safetensors")}


def test_recorded_hash_is_the_file_s(sharded: Path, tmp_path: Path) -> None:
    from shared.checkpoint.files import hash_file

    reader = HfReader(sharded)
    (tmp_path / "back").mkdir()
    hashes: dict[str, str] = {}
    write_weights(tmp_path / "back", reader.layout, lambda t: reader.rows(t.name), hashes.__setitem__)
    for name, digest in hashes.items():
        assert hash_file(tmp_path / "back" / name) == digest


def test_other_types_move_every_offset_and_the_index(sharded: Path) -> None:
    layout = HfReader(sharded).layout
    half = layout.with_dtypes(dict.fromkeys(TENSORS, "BF16"))
    assert [shard.file for shard in half.shards] == [shard.file for shard in layout.shards]
    assert {t.dtype for t in half.tensors().values()} == {"BF16"}
    assert half.shards[0].header.metadata == {"format": "pt", "by": "hand"}
    assert json.loads(str(half.index))["metadata"]["total_size"] == 320
    assert layout.with_dtypes(dict.fromkeys(TENSORS, "F32")) is layout


def test_default_layout_cuts_as_transformers_does() -> None:
    one = default_layout([("a", "F32", (4,)), ("b", "F32", (4,))])
    assert [shard.file for shard in one.shards] == ["model.safetensors"]
    assert one.index is None
    two = default_layout([(n, "F32", (4,)) for n in "abc"], shard_bytes=32)
    assert [[t.name for t in shard.header.tensors] for shard in two.shards] == [["a", "b"], ["c"]]
    assert [shard.file for shard in two.shards] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert json.loads(str(two.index))["weight_map"]["c"] == "model-00002-of-00002.safetensors"


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors is missing"):
        HfReader(sharded)


def test_truncated_shard(sharded: Path) -> None:
    file = sharded / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model-00003-of-00003.safetensors is truncated"):
        HfReader(sharded)


def change_index(folder: Path, changes: dict[str, str | None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    weight_map = {n: f for n, f in (index["weight_map"] | changes).items() if f is not None}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"t0": "model-00002-of-00003.safetensors"},
            "says that t0 is in model-00002-of-00003.safetensors, but it is in model-00001",
        ),
        ({"t0": None}, "t0 is not in model.safetensors.index.json"),
        ({"t9": "model-00002-of-00003.safetensors"}, "t9 is missing, though"),
        ({"t1": None}, "model-00002-of-00003.safetensors is not in model.safetensors.index.json"),
        ({"t1": "../other.safetensors"}, "is outside this directory"),
    ],
)
def test_index_that_is_wrong(sharded: Path, changes: dict[str, str | None], message: str) -> None:
    change_index(sharded, changes)
    with pytest.raises(UserError, match=message):
        HfReader(sharded)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"t0": 3}}', "[" * 100_000]
)
def test_what_is_no_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    for read in (HfReader, lambda path: open_checkpoint(path, kinds=("hf",), flag="--source")):
        with pytest.raises(UserError, match=f"{INDEX} is not a weight index"):
            read(sharded)


@pytest.mark.parametrize("file", ["../other.safetensors", "/tmp/other.safetensors", "a/b.safetensors"])
def test_a_layout_of_files_elsewhere_is_refused(sharded: Path, tmp_path: Path, file: str) -> None:
    """It says where an export is written: a stranger's directory must not choose files outside of the target."""
    layout = HfReader(sharded).layout.encode().replace("model-00001-of-00003.safetensors", file)
    (tmp_path / "weights.json").write_text(layout)
    with pytest.raises(UserError, match="is not a plain file name"):
        WeightLayout.read(tmp_path / "weights.json")


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"t1": TENSORS["t1"], "t0": TENSORS["t0"]}, sharded / "model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match="both hold t0"):
        HfReader(sharded)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(UserError, match="index.json is missing, though"):
        HfReader(sharded)


def torch_files(path: Path, parts: dict[str, list[str]], indexed: bool) -> Path:
    """A directory with `TENSORS` in torch's own files."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    for file, names in parts.items():
        torch.save({name: torch.from_numpy(TENSORS[name]) for name in names}, path / file)
    if indexed:
        weight_map = {name: file for file, names in parts.items() for name in names}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_torch_files_are_read_and_laid_out_as_safetensors(tmp_path: Path) -> None:
    reader = HfReader(torch_files(tmp_path / "one", {"pytorch_model.bin": sorted(TENSORS)}, indexed=False))
    assert {name: content(reader, name) for name in reader.tensors} == {n: t.tobytes() for n, t in TENSORS.items()}
    assert ([shard.file for shard in reader.layout.shards], reader.layout.index) == (["model.safetensors"], None)
    first, *rest = sorted(TENSORS)
    parts = {"pytorch_model-00001-of-00002.bin": [first], "pytorch_model-00002-of-00002.bin": rest}
    reader = HfReader(torch_files(tmp_path / "two", parts, indexed=True))
    assert content(reader, first) == TENSORS[first].tobytes()
    write_weights(tmp_path, reader.layout, lambda t: reader.rows(t.name), lambda name, digest: None)
    written = {}
    for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        written |= load_file(tmp_path / shard)
    assert {n: t.tobytes() for n, t in written.items()} == {n: t.tobytes() for n, t in TENSORS.items()}
    assert json.loads((tmp_path / INDEX).read_text())["weight_map"][first] == "model-00001-of-00002.safetensors"


def test_a_torch_file_that_the_index_names_and_is_missing(tmp_path: Path) -> None:
    parts = {"pytorch_model-00001-of-00002.bin": ["t0"], "pytorch_model-00002-of-00002.bin": ["t1"]}
    directory = torch_files(tmp_path / "two", parts, indexed=True)
    (directory / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00002.bin is missing, though"):
        HfReader(directory)


def test_large_rows_and_many_rows_come_in_bounded_blocks(tmp_path: Path) -> None:
    from shared.checkpoint.copy.blocks import BLOCK

    (tmp_path / "config.json").write_text("{}")
    many = np.arange(3 * (BLOCK // 64) * 16, dtype=np.float32).reshape(-1, 16)
    save_file({"many": many}, tmp_path / "model.safetensors")
    reader = HfReader(tmp_path)
    sizes = [len(block) for block in reader.rows("many")]
    assert max(sizes) <= BLOCK
    assert len(sizes) == 3
    assert content(reader, "many") == many.tobytes()
