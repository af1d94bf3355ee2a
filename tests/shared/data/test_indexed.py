"""The indexed dataset against Megatron-Core's reader and writer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from shared.checkpoint.files import hash_file
from shared.data import indexed
from shared.data.indexed import IndexedReader, IndexedWriter, token_dtype
from shared.errors import UserError


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 150_000])
def test_the_files_are_those_of_megatrons_own_writer(
    tmp_path: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = token_dtype(vocab_size)
    assert dtype == np.dtype(DType.optimal_dtype(vocab_size))
    random = np.random.default_rng(0)
    documents = [random.integers(0, vocab_size, size).astype(dtype) for size in (3, 1, 700, 12)]
    monkeypatch.setattr(indexed, "_WRITTEN", 1000)

    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for document in documents:
        theirs.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    theirs.finalize(str(tmp_path / "theirs.idx"))

    with IndexedWriter(tmp_path / "ours", dtype) as ours:
        ours.add(np.concatenate(documents[:3]), [len(d) for d in documents[:3]])
        ours.add(documents[3], [len(documents[3])])
    assert (ours.tokens, ours.documents) == (716, 4)
    assert ours.content_hash == hash_file(tmp_path / "ours.bin")

    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert len(read) == 4
    reader = IndexedReader(tmp_path / "theirs", flag="--data")
    assert (reader.tokens, reader.documents, reader.dtype) == (716, 4, dtype)
    reader.check(vocab_size)
    for number, document in enumerate(documents):
        start = reader.pointers[number] // dtype.itemsize
        assert np.array_equal(reader.ids[start : start + reader.lengths[number]], document)
    for mine, document in zip(read, documents, strict=True):
        assert np.array_equal(mine, document)


def test_an_error_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "x", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(3), [3])
        raise KeyError
    assert not (tmp_path / "x.idx").exists()


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A pair of Megatron's own writer."""
    builder = IndexedDatasetBuilder(str(tmp_path / "pair.bin"), dtype=np.uint16)
    for length in (3, 5):
        builder.add_document(torch.arange(length), [length])
    builder.finalize(str(tmp_path / "pair.idx"))
    return tmp_path / "pair"


def damaged(pair: Path, how: str) -> None:
    """Damage one of the two files."""
    index, content = Path(f"{pair}.idx"), Path(f"{pair}.bin")
    raw = bytearray(index.read_bytes())
    match how:
        case "no index":
            index.unlink()
        case "no content":
            content.unlink()
        case "short content":
            content.write_bytes(content.read_bytes()[:-2])
        case "long content":
            content.write_bytes(content.read_bytes() + b"\0\0")
        case "short index":
            index.write_bytes(raw[:-1])
        case "no header":
            index.write_bytes(raw[:10])
        case "text":
            index.write_bytes(b"a" * 100)
        case "modes":
            index.write_bytes(raw + b"\0\0")
        case "floats":
            raw[17] = 7
            index.write_bytes(raw)
        case "empty":
            IndexedWriter(pair, np.dtype(np.uint16)).close()
        case "sentences":
            builder = IndexedDatasetBuilder(str(content), dtype=np.uint16)
            builder.add_document(torch.arange(8), [3, 5])
            builder.finalize(str(index))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no index", r"pair.idx is missing; pair.bin is one file of two"),
        ("no content", r"pair.bin is missing; pair.idx is one file of two"),
        ("short content", r"pair.bin has 14 bytes, and pair.idx promises 16: it is truncated"),
        ("long content", r"pair.bin has 18 bytes, and pair.idx promises 16: it is of another index"),
        ("short index", r"pair.idx has 81 bytes, and its header promises 82: truncated"),
        ("no header", r"pair.idx is no Megatron index: it has 10 bytes"),
        ("text", r"pair.idx is no Megatron index of version 1"),
        ("modes", r"pair.idx has modes, of multimodal data"),
        ("floats", r"pair.idx has dtype code 7, which is not of token ids"),
        ("empty", r"pair.bin holds no token"),
        ("sentences", r"pair.idx has 2 sequences in 1 documents; preprocess it without --split-sentences"),
    ],
)
def test_a_damaged_pair_is_one_line(pair: Path, how: str, says: str) -> None:
    damaged(pair, how)
    with pytest.raises(UserError, match=f"--data .*{says}"):
        IndexedReader(pair, flag="--data")


@pytest.mark.parametrize(
    ("dtype", "ids", "says"),
    [
        (np.uint16, [1, 2, 3, 4, 9, 8], r"pair.bin: token 4 is id 9, and the tokenizer of --tokenizer has ids below 9"),
        (np.int32, [1, 2, 3, -4, 5, 8], r"pair.bin: token 3 is id -4"),
    ],
)
def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path, dtype: type, ids: list[int], says: str) -> None:
    with IndexedWriter(tmp_path / "pair", np.dtype(dtype)) as writer:
        writer.add(np.array(ids), [2, 4])
    with pytest.raises(UserError, match=says):
        IndexedReader(tmp_path / "pair", flag="--data").check(9)


def test_documents_that_do_not_follow_one_another_are_named(pair: Path) -> None:
    index = Path(f"{pair}.idx")
    raw = bytearray(index.read_bytes())
    raw[34] = 2  # the first length
    index.write_bytes(raw)
    with pytest.raises(UserError, match=r"pair.idx: document 1 does not begin where the one before it ends"):
        IndexedReader(pair, flag="--data").check(10)


def test_the_index_is_the_same_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [3, 0, 5, 1, 2, 7, 4]
    for name, block in (("whole", 1 << 20), ("blocks", 2)):
        monkeypatch.setattr(indexed, "_BLOCK", block)
        with IndexedWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            writer.add(np.arange(8), lengths[:3])
            writer.add(np.arange(14), lengths[3:])
            assert (writer.tokens, writer.documents) == (22, 7)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"whole.{suffix}").read_bytes() == (tmp_path / f"blocks.{suffix}").read_bytes()
    assert IndexedReader(tmp_path / "blocks", flag="--data").pointers.tolist() == [0, 6, 6, 16, 18, 22, 36]


def test_a_writer_that_fails_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "data", np.dtype(np.uint16)):
        raise KeyError
    assert not (tmp_path / "data.idx").exists()
