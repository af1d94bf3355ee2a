"""Sharded publishing: several processes write one directory; one publishes it, or names the faulty shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.checkpoint.copy.operations import FilePlan, WriteBytes, pack_blocks
from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.directory.sharded_publish import ShardSpec, assign_files, publish_sharded
from shared.errors import AlreadyDone, UserError
from shared.invocation import invoked

CONTENT = {f"sub/f{n}.safetensors": np.random.default_rng(n).bytes(1000 + n) for n in range(7)}
Write = Callable[..., Path]


def files(content: dict[str, bytes] | None = None) -> list[FilePlan]:
    return [
        FilePlan(
            name=name,
            size=len(data),
            sources=frozenset(),
            make_blocks=lambda data=data: pack_blocks([WriteBytes(data)]),
        )
        for name, data in (content or CONTENT).items()
    ]


@pytest.fixture
def write(tmp_path: Path, source: Path) -> Write:
    """`write("2/4")`: a shard, `publish/4` or, with None, all in one process."""

    def run(
        shard: str | None, *, content: dict[str, bytes] | None = None, overwrite: bool = False, **options: str
    ) -> Path:
        target = tmp_path / "target"
        with (
            invoked("convert", "to-hf", options | {"shard": shard}, not_fingerprinted=("shard",)),
            publish_sharded(
                target,
                kind="hf",
                inputs={"source": source},
                overwrite=overwrite,
                shard=ShardSpec.parse(shard) if shard else None,
            ) as out,
        ):
            out.write(files(content), workers=2, advance=lambda amount: None)
            assert out.writes_auxiliary_files == (shard is None or shard.startswith("publish"))
            if out.writes_auxiliary_files:
                (out.path / "config.json").write_text("{}")
                out.describe(family="llama")
        return target

    return run


def content_of(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def manifest(directory: Path) -> dict[str, object]:
    content = json.loads((directory / "manifest.json").read_text())
    return {name: value for name, value in content.items() if name not in ("options", "created")}


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_published_from_shards_it_is_the_same_directory(write: Write, tmp_path: Path, count: int) -> None:
    whole = write(None)
    wanted = content_of(whole), manifest(whole)
    shutil.rmtree(whole)
    for index in reversed(range(1, count + 1)):
        write(f"{index}/{count}")
        assert not whole.exists()
    write(f"publish/{count}")
    assert (content_of(whole), manifest(whole)) == wanted
    assert open_checkpoint(whole, kinds=("hf",), flag="--source").facts == {"family": "llama"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("count", [1, 2, 5, 7, 11])
def test_every_file_is_assigned_to_one_shard(count: int) -> None:
    assigned = [assign_files(files(), ShardSpec(index=index, count=count)) for index in range(1, count + 1)]
    assert [file.name for part in assigned for file in part] == list(CONTENT)
    if count <= 7:
        assert all(len(part) in (7 // count, -(-7 // count)) for part in assigned)


def dies(path: Path) -> None:
    """Stands for a kill; a stop leaves the same."""
    raise KeyboardInterrupt


def refused(write: Write, tmp_path: Path, shard: str = "publish/3", **options: str) -> str:
    with pytest.raises(UserError) as error:
        write(shard, **options)
    assert not (tmp_path / "target").exists()
    return str(error.value)


def test_a_missing_shard_is_named(write: Write, tmp_path: Path) -> None:
    assert "write the shards 1/3 to 3/3 first" in refused(write, tmp_path)
    write("1/3")
    write("3/3")
    assert "shard 2 of 3 is missing; run --shard 2/3 first" in refused(write, tmp_path)
    write("2/3")
    write("publish/3")


def test_a_shard_that_was_killed_is_not_taken_for_written(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("1/3")
    write("3/3")
    with monkeypatch.context() as patch:
        patch.setattr("shared.checkpoint.directory.sharded_publish.sync_tree", dies)
        with pytest.raises(KeyboardInterrupt):
            write("2/3")
    assert "shard 2 of 3 is not finished" in refused(write, tmp_path)
    write("2/3")
    write("publish/3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_shard_that_is_run_twice_is_done_already(write: Write, tmp_path: Path) -> None:
    write("2/3")
    with pytest.raises(AlreadyDone, match="shard 2 of 3"):
        write("2/3")
    write("1/3")
    write("3/3")
    write("publish/3")
    for shard in ("2/3", "publish/3"):
        with pytest.raises(AlreadyDone):
            write(shard)


def test_a_shard_of_other_options_is_named_and_can_be_written_again(write: Write, tmp_path: Path) -> None:
    other = {name: bytes(len(data)) for name, data in CONTENT.items()}
    write("1/3", dtype="bf16")
    write("2/3", dtype="fp32", content=other)
    write("3/3", dtype="bf16")
    assert "shard 2 of 3 was written with other options (--dtype fp32, now bf16); run --shard 2/3 again" in refused(
        write, tmp_path, dtype="bf16"
    )
    write("2/3", dtype="bf16")
    assert content_of(write("publish/3", dtype="bf16")).items() >= CONTENT.items()


def test_a_shard_of_another_source_is_named(write: Write, source: Path, tmp_path: Path) -> None:
    write("1/2")
    (source / "config.json").write_text('{"model_type": "qwen2"}')
    write("2/2")
    assert "shard 1 of 2 was written with another --source" in refused(write, tmp_path, "publish/2")


def test_a_shard_of_another_plan_is_named(write: Write, tmp_path: Path) -> None:
    write("1/2", content=CONTENT | {"g.safetensors": b"more"})
    write("2/2")
    assert "shard 1 of 2 was written for other files" in refused(write, tmp_path, "publish/2")


def test_a_shard_of_another_version_is_named(write: Write, tmp_path: Path) -> None:
    write("1/1")
    record = tmp_path / "target.shards-of-1" / "1-of-1" / "shard.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"version": "0.0.1"}))
    assert "was written by version 0.0.1" in refused(write, tmp_path, "publish/1")


def test_a_file_of_a_shard_that_is_missing_or_truncated_is_named(write: Write, tmp_path: Path) -> None:
    for index in (1, 2):
        write(f"{index}/2")
    name = "sub/f6.safetensors"
    file = tmp_path / "target.shards-of-2" / "2-of-2" / name
    file.write_bytes(file.read_bytes()[:-1])
    assert f"shard 2 of 2: {name} is missing or truncated" in refused(write, tmp_path, "publish/2")
    write("2/2")  # not taken for done
    assert content_of(write("publish/2")).items() >= CONTENT.items()


def test_two_divisions_of_one_target_exclude_each_other(write: Write, tmp_path: Path) -> None:
    write("1/2")
    assert "holds parts of a conversion in 2 shards" in refused(write, tmp_path, "1/3")
    with pytest.raises(UserError, match="holds parts of a conversion in 2 shards"):
        write(None)


def test_a_publication_that_is_killed_can_be_repeated(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in (1, 2, 3):
        write(f"{index}/3")
    moves = iter(range(3))
    rename = Path.rename

    def three_only(path: Path, target: Path) -> Path:
        if next(moves, None) is None:
            dies(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", three_only)
        with pytest.raises(KeyboardInterrupt):
            write("publish/3")
    assert not (tmp_path / "target").exists()
    with pytest.raises(AlreadyDone):  # its file has moved, and is not lost
        write("1/3")
    assert content_of(write("publish/3")) == CONTENT | {"config.json": b"{}"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_flipped_byte_in_what_a_shard_wrote_is_found_by_the_reader(write: Write, tmp_path: Path) -> None:
    """Publishing does not read the data again: the hash is the one of what was meant to be written."""
    for index in (1, 2):
        write(f"{index}/2")
    file = tmp_path / "target.shards-of-2" / "1-of-2" / "sub/f0.safetensors"
    data = bytearray(file.read_bytes())
    data[500] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="f0.safetensors is damaged"):
        open_checkpoint(write("publish/2"), kinds=("hf",), flag="--source")


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/0", "a/b", "publish", "-1/4", "1/4/2"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--shard"):
        ShardSpec.parse(text)
