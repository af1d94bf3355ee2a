"""The contract of directories, tested through commands: kills, full disks, damaged files, repeated runs."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Baton = Callable[..., subprocess.CompletedProcess[str]]


def hashes(directory: Path) -> dict[str, str]:
    """Content hash of every file, as the manifest has them."""
    files = json.loads((directory / "manifest.json").read_text())["files"]
    return {name: entry["hash"] for name, entry in files.items()}


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    """The only error line."""
    lines = [line for line in done.stderr.splitlines() if ": error" in line]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_a_conversion_killed_anywhere_is_finished_by_the_same_command(
    model: Path, tmp_path: Path, baton: Baton, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    words = ("to-megatron", "--source", model / "hf", "--target", tmp_path / "mg")
    began = time.monotonic()
    baton("convert", *words)
    whole = time.monotonic() - began
    shutil.rmtree(tmp_path / "mg")
    for _ in range(5):
        process = start("convert", *words)
        time.sleep(chance.uniform(0.3, 1.1) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "mg").exists():
            break
        for partial in tmp_path.iterdir():  # nothing that a reader would accept
            baton("convert", "to-hf", "--source", partial, "--target", tmp_path / "hf", code=2)
    baton("convert", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["mg"]
    assert hashes(tmp_path / "mg") == hashes(model / "mg")


def test_the_way_there_and_back_is_bit_exact(model: Path, tmp_path: Path, baton: Baton) -> None:
    baton("convert", "to-hf", "--source", model / "mg", "--target", tmp_path / "hf")
    assert hashes(tmp_path / "hf") == hashes(model / "hf")


def test_the_same_command_is_done_and_another_needs_overwrite(model: Path, tmp_path: Path, baton: Baton) -> None:
    target = tmp_path / "mg"
    words = ("to-megatron", "--source", model / "hf", "--target", target)
    baton("convert", *words)
    before = (target / "manifest.json").read_bytes()
    assert "already done" in baton("convert", *words).stderr
    assert (target / "manifest.json").read_bytes() == before
    baton("convert", "init", "--size", "tiny", "--target", tmp_path / "other")
    words = ("to-megatron", "--source", tmp_path / "other", "--target", target)
    assert "--overwrite" in one_error(baton("convert", *words, code=2))
    assert (target / "manifest.json").read_bytes() == before
    baton("convert", *words, "--overwrite")
    assert (target / "manifest.json").read_bytes() != before


def test_overlap_is_refused(model: Path, baton: Baton) -> None:
    before = hashes(model / "hf")
    for target in (model / "hf", model / "hf" / "mg", model):
        done = baton("convert", "to-megatron", "--source", model / "hf", "--target", target, code=2)
        assert "overlaps" in one_error(done)
    assert hashes(model / "hf") == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs too small for the model."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(("way", "source"), [("to-megatron", "hf"), ("to-hf", "mg")])
def test_a_full_disk_is_one_line_and_nothing_is_left(
    model: Path, small_disk: Path, baton: Baton, way: str, source: str
) -> None:
    done = baton("convert", way, "--source", model / source, "--target", small_disk / "target", code=1)
    assert "the disk is full" in one_error(done)
    assert list(small_disk.iterdir()) == []


READERS = [
    ("convert", "to-hf", "mg", ()),
    ("convert", "to-megatron", "hf", ()),
    ("pretrain", "train", "mg", ("--data", "{data}/pretrain", "--sequence-length", "64")),
    ("sft", "train", "mg", ("--data", "{data}/sft")),
    ("rlhf", "reward", "hf", ("--data", "{rows}")),
    ("rlhf", "ppo", "hf", ("--prompts", "{rows}", "--reward", "py:{function}:f")),
    ("infer", "generate", "hf", ("--prompts", "{rows}")),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, baton: Baton) -> Path:
    """Prepared data of each training tool: `pretrain/`, `sft/`."""
    place = tmp_path_factory.mktemp("data")
    (place / "text.jsonl").write_text(
        json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 200}) + "\n"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (place / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    baton(
        "pretrain", "tokenizer", "--source", place / "text.jsonl", "--target", place / "tokenizer", "--vocab-size", 300
    )
    for tool, source, more in (("pretrain", "text.jsonl", ()), ("sft", "chats.jsonl", ("--sequence-length", 64))):
        words = ("--source", place / source, "--tokenizer", place / "tokenizer", "--target", place / tool)
        baton(tool, "prepare", *words, *more)
    return place


@pytest.mark.parametrize(("tool", "name", "form", "more"), READERS, ids=[f"{t} {c}" for t, c, *_ in READERS])
def test_one_flipped_bit_is_found_by_every_reader(
    model: Path, data: Path, tmp_path: Path, baton: Baton, tool: str, name: str, form: str, more: tuple[str, ...]
) -> None:
    damaged = tmp_path / form
    shutil.copytree(model / form, damaged)
    shard = max((path for path in damaged.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "function.py").write_text("def f(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    places = {"data": data, "rows": tmp_path / "rows.jsonl", "function": tmp_path / "function.py"}
    words = [word.format(**places) for word in more]
    done = baton(tool, name, "--source", damaged, "--target", tmp_path / "target", *words, code=2)
    error = one_error(done)
    assert shard.name in error
    assert "damaged" in error
    assert not (tmp_path / "target").exists()
