"""Shards of `pretrain prepare`: the same bytes for any number of them, and after any kill."""

import fcntl
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shared.data.parts as parts
from shared.checkpoint.directory.open import open_checkpoint
from shared.cli import invoked
from shared.data.parts import plan
from shared.data.sources import expand
from shared.errors import AlreadyDone, UserError
from tools.pretrain import prepare, work_folder
from tools.pretrain.train_bpe import train, write
from tools.pretrain.work_folder import drop_if_empty, joining, open_work

TEXTS = [f"def f{i}(x):\n    return x * {i}\n" * (1 + i % 5) for i in range(60)]
Prepare = Callable[..., dict[str, Any]]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """`prepare(target, shard)` of a small corpus in many parts; facts, or none before the last shard."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "source" / "text.txt").write_text(TEXTS[3])
    (tmp_path / "tokenizer").mkdir()
    write(train(iter(TEXTS), 300), tmp_path / "tokenizer")
    monkeypatch.setattr(parts, "PART_BYTES", 400)

    def run(name: str, shard: str | None = None, **changed: Any) -> dict[str, Any]:
        target = tmp_path / name
        options: dict[str, Any] = {
            "validation": None, "validation_fraction": 0.2, "text_key": "text", "end_of_document": None, "bos": None,
            "deduplicate": "minhash", "workers": 1, "overwrite": False, **changed,
        }  # fmt: skip
        source, tokenizer = tmp_path / "source", tmp_path / "tokenizer"
        recorded = {"source": [source], "tokenizer": tokenizer, "target": target, "shard": shard, **options}
        with invoked("pretrain", "prepare", recorded, not_fingerprinted=("workers", "shard")):
            prepare.run(source=(source,), tokenizer=tokenizer, target=target, shard=shard, **options)
        return open_checkpoint(target, kinds=("dataset",), flag="--data").facts if target.exists() else {}

    return run


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def test_any_number_of_shards_and_any_kill_give_the_same_bytes(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared("one")
    expected = _bytes(tmp_path / "one")
    assert {"train.bin", "validation.idx", "dropped.npy"} <= set(expected)
    assert len(plan(expand([tmp_path / "source"], flag=""))) > 8

    for shard in ("2/3", "1/3"):
        assert not prepared("three", shard)
    assert prepared("three", "3/3") == whole
    assert _bytes(tmp_path / "three") == expected
    assert not (tmp_path / "three.work").exists()

    # 4 shards, killed at every second part; then 2, which find what is there
    before = parts.tokenize_part
    for shard in ("1/4", "2/4"):
        if not (child := os.fork()):
            count = iter(range(9))

            def killed(part: parts.Part, count: Any = count) -> parts.FinishedPart:
                if next(count) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return before(part)

            monkeypatch.setattr(prepare, "tokenize_part", killed)
            try:
                prepared("four", shard)
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert sum(path.name.endswith(".documents.npy") for path in (tmp_path / "four.work").iterdir()) == 4
    with pytest.raises(UserError, match=r"--shard publish/4: \d+ of \d+ parts are not finished"):
        prepared("four", "publish/4")
    assert not prepared("four", "2/2")
    assert prepared("four", "1/2") == whole
    assert _bytes(tmp_path / "four") == expected
    with pytest.raises(AlreadyDone):
        prepared("four", "1/2")


def test_a_kill_while_parts_are_joined_loses_nothing(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared("one")
    assert not prepared("out", "1/2")
    if not (child := os.fork()):
        monkeypatch.setattr(prepare, "copy_tokenizer", lambda *given: os.kill(os.getpid(), signal.SIGKILL))
        try:
            prepared("out", "2/2")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert prepared("out", "publish/2") == whole
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "one")


def test_a_shard_takes_no_parts_of_another_command_or_of_changed_sources(prepared: Prepare, tmp_path: Path) -> None:
    assert not prepared("out", "1/2")
    assert not prepared("out", "2/2", validation_fraction=0.4)
    (tmp_path / "source" / "text.txt").write_text(TEXTS[4] + "another")
    assert not prepared("out", "2/2")
    assert prepared("out", "1/2")["splits"] == prepared("whole")["splits"]


def test_one_shard_joins_and_one_process_works_alone(prepared: Prepare, tmp_path: Path) -> None:
    assert not prepared("out", "1/2")
    with joining(tmp_path / "out.work") as alone:
        assert alone
        assert not prepared("out", "2/2")
    held = prepare.open_work(tmp_path / "out.work", shard=True)
    with pytest.raises(UserError, match="another process"):
        prepared("out")
    assert prepared("out", "2/2")
    os.close(held)


def test_a_shard_that_fails_leaves_the_folder_to_others(prepared: Prepare, tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    whole = prepared("whole")
    rows = tmp_path / "source" / "rows.jsonl"
    content = rows.read_text()
    rows.write_text("broken\n" + content)
    other = open_work(work, shard=True)  # another shard, before its first part is finished
    with pytest.raises(UserError, match=r"rows\.jsonl:1: not JSON"):
        prepared("out", "1/2")
    assert os.path.samestat(work.stat(), os.fstat(other))
    os.close(other)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: not JSON"):
        prepared("out", "1/2")
    assert not work.exists()
    rows.write_text(content)
    assert prepared("out", "1/1") == whole


def test_a_folder_that_goes_while_it_is_opened_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, before, removed = tmp_path / "out.work", fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not removed:  # a shard that failed was quicker
            removed.append(work.rmdir())
        before(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    held = open_work(work, shard=True)
    assert len(removed) == 1
    assert os.path.samestat(work.stat(), os.fstat(held))
    os.close(held)


def test_a_shard_waits_while_one_that_failed_removes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, before, refused = tmp_path / "out.work", fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not refused:  # `drop_if_empty` of the other holds it alone
            refused.append(work.rmdir())
            raise BlockingIOError
        before(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    held = open_work(work, shard=True)
    assert os.path.samestat(work.stat(), os.fstat(held))
    monkeypatch.undo()
    (work / "part.tokens.new-1-a").touch()  # of a worker that was ended as it wrote
    drop_if_empty(work, held)
    assert not work.exists()
    os.close(held)
    alone = open_work(work)
    monkeypatch.setattr(work_folder, "_PATIENCE", 0.2)
    with pytest.raises(UserError, match="another process"):
        open_work(work, shard=True)
    os.close(alone)


@pytest.mark.parametrize("shard", ["0/4", "5/4", "2", "a/4", "1/0"])
def test_a_wrong_shard_is_refused(prepared: Prepare, tmp_path: Path, shard: str) -> None:
    with pytest.raises(UserError, match=f"--shard {shard}: "):
        prepared("out", shard)
    assert not (tmp_path / "out.work").exists()
