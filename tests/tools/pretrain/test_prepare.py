"""Text to an indexed dataset: read back with Megatron-Core's reader and compared with the text itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

import shared.data.parts as parts
import shared.data.tokenizer_backends as tokenizer_backends
from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.files import hash_file
from shared.cli import invoked
from shared.data.parts import init_worker, plan
from shared.data.sources import Piece, expand, texts
from shared.errors import AlreadyDone, UserError
from tests.tools.pretrain import comparing
from tools.pretrain import prepare
from tools.pretrain.train_bpe import train, write

TEXTS = [f"def f{i}(x):\n    return x * {i}  # \u00e9 <|endoftext|>\n" * (1 + i % 5) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write(train(iter(TEXTS), 320), folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:50])
    (folder / "rows.jsonl").write_text(rows)
    for number, text in enumerate(TEXTS[50:]):
        (folder / f"text{number}.txt").write_text(text)
    (folder / "empty.txt").write_text("")
    return folder


def _prepare(source: Path, tokenizer: Path, target: Path, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "validation": None,
        "validation_fraction": 0.0,
        "text_key": "text",
        "end_of_document": None,
        "bos": None,
        "workers": 1,
        "overwrite": False,
        **options,
    }
    recorded = {"source": [source], "tokenizer": tokenizer, "target": target, **given}
    with invoked("pretrain", "prepare", recorded, not_fingerprinted=("workers",)):
        prepare.run(source=(source,), tokenizer=tokenizer, target=target, **given)
    return open_checkpoint(target, kinds=("dataset",), flag="--data").facts


def _read(target: Path, split: str) -> list[str]:
    """Every document, decoded, its end checked and taken off."""
    tokenizer = AutoTokenizer.from_pretrained(target / "tokenizer")
    found = []
    for document in IndexedDataset(str(target / split)):
        assert document[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in document[:-1], "a text that spells the token out is not the token"
        found.append(tokenizer.decode(document[:-1].tolist()))
    return found


def _lengths(target: Path) -> list[int]:
    dataset = IndexedDataset(str(target / "train"))  # kept: its arrays are views of files that it closes when it goes
    return dataset.sequence_lengths.tolist()  # type: ignore[no-any-return]


def test_documents_come_back_in_order(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    facts = _prepare(source, tokenizer, tmp_path / "out")
    expected = [
        text for file in expand([source], flag="") for piece in plan([file])[0].pieces for text in texts(piece, "text")
    ]
    assert _read(tmp_path / "out", "train") == [text for text in expected if text]
    split = facts["splits"]["train"]
    assert split["documents"] == 60
    assert split["utf8_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert split["tokens"] == sum(_lengths(tmp_path / "out"))
    assert facts["empty_documents"] == 1
    assert (facts["format"], facts["dtype"]) == ("indexed", "uint16")
    assert facts["tokenizer_backend"]["name"] == "tokenizers"
    assert "too little" in facts["tokenizer_backend"]["reason"]
    assert not (tmp_path / "out.work").exists()


def test_the_number_of_workers_changes_nothing(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 500)  # many parts
    one = _prepare(source, tokenizer, tmp_path / "one", workers=1, validation_fraction=0.3)
    two = _prepare(source, tokenizer, tmp_path / "two", workers=2, validation_fraction=0.3)
    assert one == two
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_parts_change_neither_tokens_nor_order(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _prepare(source, tokenizer, tmp_path / "large")
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    monkeypatch.setattr(parts, "BATCH_CHARACTERS", 40)  # long texts are encoded in stretches
    _prepare(source, tokenizer, tmp_path / "small")
    assert (tmp_path / "small" / "train.bin").read_bytes() == (tmp_path / "large" / "train.bin").read_bytes()
    assert (tmp_path / "small" / "train.idx").read_bytes() == (tmp_path / "large" / "train.idx").read_bytes()


def test_a_share_for_validation_keeps_equal_texts_together(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    (source / "again.jsonl").write_text((source / "rows.jsonl").read_text())
    facts = _prepare(source, tokenizer, tmp_path / "out", validation_fraction=0.3)
    train, validation = _read(tmp_path / "out", "train"), _read(tmp_path / "out", "validation")
    assert sorted(train + validation) == sorted(TEXTS + TEXTS[:50])
    assert not set(train) & set(validation)
    assert facts["validation_documents_in_train"] == 0
    assert 0.1 < len(validation) / 110 < 0.5


def test_documents_in_both_splits_are_counted(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    other = tmp_path / "validation.jsonl"
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in [TEXTS[3], "something else", TEXTS[55]]))
    facts = _prepare(source, tokenizer, tmp_path / "out", validation=(other,))
    assert facts["validation_documents_in_train"] == 2
    assert facts["splits"]["validation"]["documents"] == 3
    assert _read(tmp_path / "out", "validation") == [TEXTS[3], "something else", TEXTS[55]]


def test_the_fast_back_end_gives_the_same_dataset(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 500)
    slow = _prepare(source, tokenizer, tmp_path / "slow", validation_fraction=0.3, bos=True)
    monkeypatch.setattr(tokenizer_backends, "WORTH_IT", 0)
    monkeypatch.setattr(parts, "SAMPLED", 2)
    monkeypatch.setattr(parts, "BATCH_CHARACTERS", 40)
    fast = _prepare(source, tokenizer, tmp_path / "fast", validation_fraction=0.3, bos=True)
    backend = fast.pop("tokenizer_backend")
    assert slow.pop("tokenizer_backend")["name"] == "tokenizers"
    assert fast == slow
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx"):
        assert (tmp_path / "slow" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()
    assert backend["name"] == "fastokens"
    assert backend["compared_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert backend["sampled_texts"] > 10


@pytest.mark.parametrize("workers", [1, 2])
def test_ids_that_differ_end_in_the_same_dataset_without_the_fast_back_end(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Parts by the fast back end are begun behind the comparison, and left when it fails."""
    monkeypatch.setattr(parts, "PART_BYTES", 500)
    slow = _prepare(source, tokenizer, tmp_path / "slow")
    monkeypatch.setattr(tokenizer_backends, "WORTH_IT", 0)
    fast = _prepare(source, tokenizer, tmp_path / "fast", workers=workers)
    monkeypatch.setattr(prepare, "compare_texts", comparing.other_ids)
    other = _prepare(source, tokenizer, tmp_path / "other", workers=workers)
    used = [facts.pop("tokenizer_backend") for facts in (slow, fast, other)]
    assert [backend["name"] for backend in used] == ["tokenizers", "fastokens", "tokenizers"]
    here = f"process {os.getpid()} found other ids"
    assert "found other ids" in used[2]["reason"]
    assert (used[2]["reason"] == here) == (workers == 1), "where the work is"
    assert slow == fast == other
    for name in ("train.bin", "train.idx"):
        content = {(tmp_path / each / name).read_bytes() for each in ("slow", "fast", "other")}
        assert len(content) == 1
    manifest = json.loads((tmp_path / "fast" / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        assert entry["hash"] == hash_file(tmp_path / "fast" / name)
    assert not list(tmp_path.glob("*.work"))


@pytest.mark.parametrize("method", ["exact", "minhash"])
def test_repeated_documents_are_left_out_and_accounted_for(
    source: Path, tokenizer: Path, tmp_path: Path, method: str
) -> None:
    again = [*TEXTS[3:9], TEXTS[20].upper()]
    (source / "zz.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in again))
    facts = _prepare(source, tokenizer, tmp_path / "out", deduplicate=method)
    account = facts["deduplication"]
    assert account["documents"] == {"train": 67}
    kept = facts["splits"]["train"]["documents"]
    assert account["dropped"]["train"] == 67 - kept
    dropped = np.load(tmp_path / "out" / "dropped.npy")
    assert len(dropped) == 67 - kept
    assert (dropped[:, 1] < dropped[:, 0]).all()
    found = _read(tmp_path / "out", "train")
    whole = [text for file in expand([source], flag="") for text in texts(plan([file])[0].pieces[0], "text") if text]
    assert found == [text for index, text in enumerate(whole) if index not in dropped[:, 0]]
    if method == "exact":
        assert kept == 61  # the upper-cased one is another text
        assert [whole[earlier] for earlier in dropped[:, 1]] == [whole[later] for later in dropped[:, 0]]
        assert "library" not in account
    else:
        assert kept < 61  # of each function's text repeated one to five times, most are near-duplicates
        assert account["library"].startswith("rensa ")


def test_a_training_document_that_repeats_a_validation_document_is_left_out(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    other = tmp_path / "validation.jsonl"
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in [TEXTS[3], TEXTS[3], "something else"]))
    facts = _prepare(source, tokenizer, tmp_path / "out", validation=(other,), deduplicate="exact")
    assert facts["deduplication"]["dropped"] == {"validation": 1, "train": 1}
    assert facts["validation_documents_in_train"] == 0
    assert _read(tmp_path / "out", "validation") == [TEXTS[3], "something else"]
    assert TEXTS[3] not in _read(tmp_path / "out", "train")


def test_a_large_vocabulary_is_stored_in_four_bytes(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    wide = shutil.copytree(tokenizer, tmp_path / "wide")
    content = json.loads((wide / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"unused{i}": i for i in range(len(vocabulary), 65500)}
    (wide / "tokenizer.json").write_text(json.dumps(content))
    facts = _prepare(source, wide, tmp_path / "out")
    assert (facts["dtype"], facts["vocab_size"]) == ("int32", 65500)
    _prepare(source, tokenizer, tmp_path / "narrow")
    assert _read(tmp_path / "out", "train") == _read(tmp_path / "narrow", "train")


def test_a_mistake_names_file_and_line_and_publishes_nothing(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    with (source / "rows.jsonl").open("a") as file:
        file.write('{"text": "unfinished\n')
    with pytest.raises(UserError, match=rf"{source}/rows\.jsonl:51: not JSON"):
        _prepare(source, tokenizer, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_sources_without_text_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="--source has no text"):
        _prepare(tmp_path / "empty.txt", tokenizer, tmp_path / "out")
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(UserError, match="--validation-fraction 0.001 leaves no document"):
        _prepare(tmp_path / "one.txt", tokenizer, tmp_path / "out", validation_fraction=0.001)


def test_both_kinds_of_validation_or_a_file_twice_are_refused(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not both"):
        _prepare(source, tokenizer, tmp_path / "out", validation=(source,), validation_fraction=0.1)
    with pytest.raises(UserError, match=r"rows\.jsonl: this file is also in --source"):
        _prepare(source, tokenizer, tmp_path / "out", validation=(source / "rows.jsonl",))


def test_a_killed_run_goes_on_from_its_parts(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 500)
    whole = _prepare(source, tokenizer, tmp_path / "whole")
    total = len(plan(expand([source], flag="")))

    script = f"""
import sys, os, signal
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
import shared.data.parts as parts
parts.PART_BYTES = 500
from pathlib import Path
from shared.cli import invoked
from tools.pretrain import prepare
before, count = parts.tokenize_part, 0
def counted(part):
    global count
    count += 1
    if count == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(part)
prepare.tokenize_part = counted
with invoked("pretrain", "prepare", {{}}):
    prepare.run(source=(Path({str(source)!r}),), tokenizer=Path({str(tokenizer)!r}), target=Path({str(tmp_path / "out")!r}),
        validation=None, validation_fraction=0.0, text_key="text",
        end_of_document=None, bos=None, workers=1, overwrite=False)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_checkpoint(tmp_path / "out.work", kinds=("dataset",), flag="--data")
    assert not list(tmp_path.glob("out.partial-*"))  # the dataset is begun when all parts are there

    (source / "text9.txt").write_text(TEXTS[0])  # the last part changes, those before are found again
    capfd.readouterr()
    changed = _prepare(source, tokenizer, tmp_path / "out")
    assert f"5 of {total} parts were finished by an earlier run" in capfd.readouterr().err
    (source / "text9.txt").write_text(TEXTS[59])
    assert changed["source_hash"] != whole["source_hash"]
    assert _prepare(source, tokenizer, tmp_path / "out", overwrite=True) == whole
    assert (tmp_path / "out" / "train.bin").read_bytes() == (tmp_path / "whole" / "train.bin").read_bytes()


def test_a_finished_dataset_is_not_made_again(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    _prepare(source, tokenizer, tmp_path / "out")
    (tmp_path / "out.work").mkdir()  # as when killed between publishing and clearing up
    with pytest.raises(AlreadyDone):
        _prepare(source, tokenizer, tmp_path / "out", workers=2)
    assert not (tmp_path / "out.work").exists()
    with pytest.raises(UserError, match="--overwrite"):
        _prepare(source, tokenizer, tmp_path / "out", text_key="body")


def test_two_at_once_are_told_apart(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    held = prepare.open_work(work)
    with pytest.raises(UserError, match="another process"):
        _prepare(source, tokenizer, tmp_path / "out")
    os.close(held)
    _prepare(source, tokenizer, tmp_path / "out")


def test_the_recipe_names_the_parts(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    part = plan(expand([source], flag=""))[0]
    recipe, _ = prepare._recipe(tokenizer, "text", None, None)
    (tmp_path / "work").mkdir()
    init_worker(recipe, tmp_path / "work")
    first = parts.tokenize_part(part)
    assert parts.tokenize_part(part).reused
    names = {first.name}
    for change in ({"eos_token_id": recipe.eos_token_id + 1}, {"bos_token_id": 0}):
        init_worker(prepare.Recipe(**{**vars(recipe), **change}), tmp_path / "work")
        names.add(parts.tokenize_part(part).name)
    assert len(names) == 3
    assert isinstance(part.pieces[0], Piece)


def test_the_tokenizer_opens_without_torch_and_is_the_same(tokenizer: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tools.pretrain import prepare; prepare._without_torch()\n"
        "recipe, ends = prepare._recipe_of((Path(sys.argv[1]), 'text', None, None))\n"
        "print(sys.modules['torch'], recipe.digest.hex(), recipe.cut, ends, sep='\\n')"
    )
    words = [sys.executable, "-c", script, tokenizer]
    done = subprocess.run(words, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    recipe, ends = prepare._recipe(tokenizer, "text", None, None)
    assert done.stdout == f"None\n{recipe.digest.hex()}\n{recipe.cut}\n{ends}\n"
    assert not done.stderr


def test_documents_begin_and_end_with_the_tokens_asked_for(
    source: Path, tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = _prepare(source, tokenizer, tmp_path / "plain")
    assert (plain["end_of_document"], plain["begin_of_document"]) == ("<|endoftext|>", None)
    assert "each document ends with <|endoftext|> (0): the tokenizer's eos token\n" in capfd.readouterr().err
    facts = _prepare(source, tokenizer, tmp_path / "out", end_of_document="<|pad|>", bos=True)
    opened = AutoTokenizer.from_pretrained(tokenizer)
    pad, bos = opened.convert_tokens_to_ids("<|pad|>"), opened.bos_token_id
    assert (facts["end_of_document"], facts["begin_of_document"], facts["eos_token_id"]) == (
        "<|pad|>",
        "<|endoftext|>",
        pad,
    )
    assert "each document begins with <|endoftext|> (0) and ends with <|pad|> (1): --end-of-document, --bos" in (
        capfd.readouterr().err
    )
    first, second = IndexedDataset(str(tmp_path / "plain" / "train")), IndexedDataset(str(tmp_path / "out" / "train"))
    assert facts["splits"]["train"]["tokens"] == plain["splits"]["train"]["tokens"] + 60
    for before, after in zip(first, second, strict=True):
        assert after.tolist() == [bos, *before[:-1].tolist(), pad]
    with pytest.raises(UserError, match=r"--end-of-document </s>: no token of the tokenizer"):
        _prepare(source, tokenizer, tmp_path / "none", end_of_document="</s>")
    assert not (tmp_path / "none").exists()
