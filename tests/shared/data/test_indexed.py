"""The indexed dataset against Megatron-Core's reader and writer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from shared.data.indexed import IndexedWriter, token_dtype


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 150_000])
def test_the_files_are_those_of_megatrons_own_writer(tmp_path: Path, vocab_size: int) -> None:
    dtype = token_dtype(vocab_size)
    assert dtype == np.dtype(DType.optimal_dtype(vocab_size))
    random = np.random.default_rng(0)
    documents = [random.integers(0, vocab_size, size).astype(dtype) for size in (3, 1, 700, 12)]

    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for document in documents:
        theirs.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    theirs.finalize(str(tmp_path / "theirs.idx"))

    with IndexedWriter(tmp_path / "ours", dtype) as ours:
        ours.add(np.concatenate(documents[:3]), [len(d) for d in documents[:3]])
        ours.add(documents[3], [len(documents[3])])
    assert (ours.tokens, ours.documents) == (716, 4)

    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert len(read) == 4
    for mine, document in zip(read, documents, strict=True):
        assert np.array_equal(mine, document)


def test_an_error_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "x", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(3), [3])
        raise KeyError
    assert not (tmp_path / "x.idx").exists()
