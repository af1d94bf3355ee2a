from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.checkpoint.directory import manifest
from shared.checkpoint.directory.manifest import input_fingerprint
from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.directory.publish import publish
from shared.checkpoint.files import hash_bytes, hash_file
from shared.errors import AlreadyDone, StageError, UserError
from shared.invocation import invoked

STAGE = """
import sys
from pathlib import Path
from shared.checkpoint.directory.publish import publish
from shared.invocation import invoked
source, target, fill, overwrite = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "overwrite"
with invoked("convert", "to-hf", {}):
    with publish(target, kind="hf", inputs={"source": source}, overwrite=overwrite) as out:
        print("begun", flush=True)
        for number in range(40):
            (out.path / f"{number:02}.safetensors").write_bytes(fill.encode() * 200_000)
print("published", flush=True)
"""


def test_published_directory_has_what_was_written_and_says_where_it_came_from(published: Callable[..., Path]) -> None:
    target = published()
    manifest = json.loads((target / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "nested/a.txt"}
    assert manifest["files"]["model.safetensors"] == {"size": 5000, "hash": hash_bytes(b"0" * 5000)}
    assert manifest["facts"] == {"family": "llama", "tensors": 3}
    assert (manifest["tool"], manifest["command"], manifest["bytes"]) == ("convert", "to-hf", 5001)
    assert [parent["flag"] for parent in manifest["parents"]] == ["source"]
    assert sorted(path.name for path in target.parent.iterdir()) == ["published", "source"]


def test_the_same_run_again_is_already_done(published: Callable[..., Path]) -> None:
    target = published()
    before = (target / "manifest.json").read_bytes()
    with pytest.raises(AlreadyDone, match="already done"):
        published()
    assert (target / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("change", ["option", "input"])
def test_another_run_needs_overwrite(published: Callable[..., Path], source: Path, change: str) -> None:
    target = published()
    if change == "input":
        (source / "config.json").write_text('{"model_type": "qwen2"}')
    dtype = "fp32" if change == "option" else "bf16"
    with invoked("convert", "to-hf", {"dtype": dtype}):
        with pytest.raises(UserError, match="--overwrite"):
            published()
        assert (target / "model.safetensors").read_bytes() == b"0" * 5000
        published(content=b"1" * 10, overwrite=True)
    assert (target / "model.safetensors").read_bytes() == b"1" * 10
    assert sorted(path.name for path in target.parent.iterdir()) == ["published", "source"]


def test_a_large_file_is_told_apart_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"0" * 100)
    assert input_fingerprint(file) == hash_file(file)
    monkeypatch.setattr(manifest, "_SMALL", 99)
    monkeypatch.setattr(manifest, "hash_file", None)
    first = input_fingerprint(file)
    assert input_fingerprint(file) == first
    os.utime(file, ns=(0, 1))
    later = input_fingerprint(file)
    with file.open("ab") as more:
        more.write(b"0")
    os.utime(file, ns=(0, 1))
    assert len({first, later, input_fingerprint(file)}) == 3


def test_options_outside_the_fingerprint_are_the_same_run(published: Callable[..., Path]) -> None:
    published()
    with (
        invoked("convert", "to-hf", {"dtype": "bf16", "workers": 9}, not_fingerprinted=("workers",)),
        pytest.raises(AlreadyDone),
    ):
        published()


def test_damaged_result_is_not_called_done(published: Callable[..., Path]) -> None:
    target = published()
    (target / "model.safetensors").write_bytes(b"0" * 4999)
    with pytest.raises(UserError, match="model.safetensors has 4999 bytes instead of 5000"):
        published()


@pytest.mark.parametrize("place", ["source", "source/inside", ".", "link/inside"])
def test_overlap_with_an_input_is_refused(source: Path, place: str) -> None:
    (source.parent / "link").symlink_to(source)
    target = source.parent / place
    with pytest.raises(UserError, match="overlaps --source"), publish(target, kind="hf", inputs={"source": source}):
        pass
    assert sorted(path.name for path in source.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("place", "says"), [("link", "is a link"), ("nowhere", "is a link"), ("file/below", "file is a file")]
)
def test_a_target_where_no_directory_can_be_put(source: Path, tmp_path: Path, place: str, says: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "nowhere").symlink_to("nothing")
    with pytest.raises(UserError, match=says), publish(tmp_path / place, kind="hf", inputs={"source": source}):
        pass
    assert not any((tmp_path / "folder").iterdir())


def test_a_directory_of_somebody_else_is_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with (
            pytest.raises(UserError, match="was not made by Baton"),
            publish(tmp_path / "home", kind="hf", inputs={"source": source}, overwrite=overwrite),
        ):
            pass
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_an_error_publishes_nothing(source: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        publish(tmp_path / "target", kind="hf", inputs={"source": source}) as out,
    ):
        (out.path / "half").write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_hash_recorded_for_nothing_is_an_error(source: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(StageError, match="model.bin"),
        publish(tmp_path / "target", kind="hf", inputs={"source": source}) as out,
    ):
        out.record_hash("model.bin", "xxh3_128:0")
    assert not (tmp_path / "target").exists()


def _command(source: Path, target: Path, fill: str, overwrite: bool) -> list[str]:
    return [sys.executable, "-c", STAGE, str(source), str(target), fill, "overwrite" if overwrite else "new"]


def _start(source: Path, target: Path, fill: str, overwrite: bool) -> subprocess.Popen[str]:
    process = subprocess.Popen(_command(source, target, fill, overwrite), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("overwrite", [False, True])
def test_sigkill_at_random_points_leaves_the_old_or_the_new(source: Path, tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "target"
    if overwrite:
        _start(source, target, "old", overwrite=False).wait()
        (source / "config.json").write_text("{}")
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(6):
        process = _start(source, target, "new", overwrite)
        time.sleep(chance.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for beside in tmp_path.glob("target.partial-*"):
            with pytest.raises(UserError):
                open_checkpoint(beside, kinds=("hf",), flag="--source")
        if target.exists():
            checkpoint = open_checkpoint(target, kinds=("hf",), flag="--source")
            content = {path.read_bytes()[:3] for path in checkpoint.path.glob("*.safetensors")}
            assert content in ({b"old"}, {b"new"})
            assert content == {b"new"} or overwrite
            if content == {b"new"}:
                break
        else:
            assert not overwrite
    # finishes the work, or finds it done and clears what the kill left beside it
    last = subprocess.run(_command(source, target, "new", overwrite), capture_output=True, text=True, check=False)
    assert last.returncode == 0 or "AlreadyDone" in last.stderr
    assert {path.read_bytes()[:3] for path in target.glob("*.safetensors")} == {b"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_two_publishers_of_one_target_exclude_each_other(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with publish(target, kind="hf", inputs={"source": source}) as out:
        (out.path / "a").write_text("a")
        with (
            pytest.raises(UserError, match="another process is writing it"),
            publish(target, kind="hf", inputs={"source": source}),
        ):
            pass
    assert (target / "a").read_text() == "a"


def test_a_kill_between_the_renames_of_a_replacement_is_repaired(published: Callable[..., Path]) -> None:
    """On file systems without RENAME_EXCHANGE the old directory is renamed for a moment."""
    target = published()
    target.rename(target.with_name("published.replaced-0123"))
    with pytest.raises(AlreadyDone):
        published()
    assert (target / "model.safetensors").read_bytes() == b"0" * 5000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of one mebibyte."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_leaves_nothing_and_loses_nothing(source: Path, small_disk: Path) -> None:
    target = small_disk / "target"
    (small_disk / "precious").write_text("kept")
    with pytest.raises(OSError, match="No space left"), publish(target, kind="hf", inputs={"source": source}) as out:
        (out.path / "model.safetensors").write_bytes(os.urandom(2 << 20))
    assert [path.name for path in small_disk.iterdir()] == ["precious"]
    with publish(target, kind="hf", inputs={"source": source}) as out:
        (out.path / "model.safetensors").write_bytes(b"fits")
    assert open_checkpoint(target, kinds=("hf",), flag="--source").path == target
