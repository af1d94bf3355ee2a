"""The result does not depend on the number of workers and shards."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.checkpoint.copy import blocks
from shared.checkpoint.formats import torch_dist_writer

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in as many blocks and files as a large one."""
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    monkeypatch.setattr(torch_dist_writer, "_SMALLEST", 40_000)
    monkeypatch.setattr("tools.convert.plan_import.CHUNK_BYTES", 7000)


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
    assert "shard 2 of 2 was written with other options (--dtype fp32, now unset)" in answer.err
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
    for count in ("0", "-1", "1000000"):
        words = ("--source", tmp_path / "hf", "--target", tmp_path / "n", "--workers", count)
        assert (answer := convert("to-megatron", *words)).code == 2
        assert f"--workers {count}" in answer.err


def test_progress_is_told_in_bytes(
    make_hf: Make, convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.console._LINE_EVERY", 0.0)
    answer = convert("to-megatron", "--source", make_hf("llama-one-fp32-layer"), "--target", tmp_path / "m")
    size = sum(path.stat().st_size for path in (tmp_path / "m" / "release").glob("*.distcp"))
    told = re.findall(r"converting: ([\d.]+) (\w+) of ([\d.]+) KiB \((\d+)%\)", answer.err)
    assert len(told) > 10
    assert {whole for _, _, whole, _ in told} == {f"{size / 1024:.1f}"}
    percents = [int(percent) for *_, percent in told]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert told[-1][:2] == (f"{size / 1024:.1f}", "KiB")


KILLED = """
import sys, time
import shared.checkpoint.copy.blocks, shared.checkpoint.copy.worker_pool, shared.checkpoint.copy.journal
import shared.checkpoint.formats.torch_dist_writer
import tools.convert.plan_import
from tools.convert.cli import tool
shared.checkpoint.copy.blocks.BLOCK = 1000
shared.checkpoint.copy.journal._EVERY = 3000
shared.checkpoint.formats.torch_dist_writer._SMALLEST = 40_000
tools.convert.plan_import.CHUNK_BYTES = 7000
put = shared.checkpoint.copy.worker_pool._FileWriter._put
def slowly(*arguments):  # or all would be written before the one who watches has looked
    time.sleep(0.001)
    put(*arguments)
shared.checkpoint.copy.worker_pool._FileWriter._put = slowly
print("begun", flush=True)
tool.run(sys.argv[1:])
"""


def noted(directory: Path) -> int:
    """Bytes of the journals of what is in the making; 0 as soon as it is made."""
    with contextlib.suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in directory.glob("t.*/**/.journal"))
    return 0


def start(*words: str | Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("words", [(), ("--shard", "1/1")], ids=["whole", "shard"])
@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_killed_or_stopped_at_random_points_and_the_same_command_again(
    make_hf: Make, convert: Any, tmp_path: Path, direction: str, words: tuple[str, ...]
) -> None:
    source, wanted = make_hf("llama-one-fp32-layer"), tmp_path / "wanted"
    if direction == "to-hf":
        convert("to-megatron", "--source", source, "--target", tmp_path / "m")
        source = tmp_path / "m"
    assert convert(direction, "--source", source, "--target", wanted).code == 0
    target = tmp_path / "t"
    command = (direction, "--source", source, "--target", target, *words)
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    chance, kept = random.Random(seed), 0
    for _ in range(10):
        enough = noted(tmp_path) + chance.uniform(0, 6000)  # bytes of some 15000; machines differ in time
        process, number = start(*command), signal.SIGTERM
        while process.poll() is None:
            if noted(tmp_path) >= enough:
                process.send_signal(number := chance.choice([signal.SIGKILL, signal.SIGTERM]))
                break
        _, said = process.communicate()
        assert process.returncode in (0, 75 if number is signal.SIGTERM else -number), said
        kept += "verified and kept" in said
        if process.returncode == 0 or kept >= 2:
            break
        assert not target.exists()
    answer = convert(*command)
    assert answer.code == 0, answer.err
    if words:
        assert convert(*command[:-2], "--shard", "publish/1").code == 0
    assert kept + ("verified and kept" in answer.err) >= 1, "no run found anything of the one before"
    assert files(target) == files(wanted)
    assert manifest(target) == manifest(wanted)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("t.")]


@pytest.mark.parametrize("change", ["damage", "cut", "options", "source"])
def test_what_a_kill_left_is_not_trusted(make_hf: Make, convert: Any, tmp_path: Path, change: str) -> None:
    source = make_hf("llama-gqa")
    convert("to-megatron", "--source", source, "--target", tmp_path / "m")
    command = ["to-hf", "--source", tmp_path / "m", "--target", tmp_path / "t"]
    with pytest.MonkeyPatch.context() as patch:  # all is written, and then it is told to stop
        patch.setattr("tools.convert.to_hf.copy_auxiliary_files", interrupted)
        assert convert(*command).code == 130
    (partial,) = tmp_path.glob("t.partial-*")
    weights = partial / "model.safetensors"
    (partial / "config.json").write_text("half of a")
    if change == "damage":
        data = bytearray(weights.read_bytes())
        data[5000] ^= 1
        weights.write_bytes(data)
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:7000])
    elif change == "options":
        command += ["--dtype", "bf16"]
    else:
        shutil.rmtree(tmp_path / "m")
        shutil.rmtree(source)
        convert("to-megatron", "--source", make_hf("llama-gqa", seed=1), "--target", tmp_path / "m")
    answer = convert(*command)
    assert answer.code == 0, answer.err
    assert ("by an earlier run is damaged; writing it again" in answer.err) == (change in ("damage", "cut"))
    assert ("left by a killed run" in answer.err) == (change in ("options", "source"))
    assert {n: c for n, c in files(tmp_path / "t").items() if n != "config.json"} == {
        n: c for n, c in files(source).items() if n != "config.json"
    }
    assert json.loads((tmp_path / "t" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert not list(tmp_path.glob("t.partial-*"))


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt
