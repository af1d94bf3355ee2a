"""Pickles as data: code is refused; torch reads the pickles that we write."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest

from shared.checkpoint.formats.torch_pickle import Call, Instance, Name, Pairs, read_pickle, write_pickle
from shared.errors import UserError


class Runs:
    """Unpickled by pickle itself, this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickle_that_runs_something_is_refused(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps({"a": Runs(tmp_path / "proof")}, protocol)
    with pytest.raises(UserError, match=r"x names (__builtin__|builtins)\.exec.*was not executed"):
        read_pickle(data, "x")
    assert not (tmp_path / "proof").exists()
    pickle.loads(data)
    assert (tmp_path / "proof").exists()  # it would have


@pytest.mark.parametrize("name", ["os\nsystem", "torch\nload", "torch.distributed.checkpoint.filesystem\nos"])
def test_names_beside_the_known_ones_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="which is not allowed in a weight checkpoint"):
        read_pickle(f"c{name}\n.".encode(), "x")


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps([1, 2])[:-3]])
def test_damaged_pickle(data: bytes) -> None:
    with pytest.raises(UserError, match="x is damaged"):
        read_pickle(data, "x")


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -1, 255, 1 << 31, -(1 << 31), -(1 << 31) - 1, 1 << 40, 1.5, "é", (), (1,), []),
        {"a": [1, {"b": ("a", "a")}], "c": {}},
    ],
)
def test_plain_values_both_ways(value: Any) -> None:
    data = write_pickle(value)
    assert pickle.loads(data) == value
    assert read_pickle(data, "x") == value


def test_objects_as_torch_reads_them() -> None:
    import torch
    from torch.distributed.checkpoint.metadata import MetadataIndex

    module = "torch.distributed.checkpoint.metadata"
    size = Call(Name("torch", "Size"), ((2, 3),))
    index = Instance(Name(module, "MetadataIndex"), {"fqn": "w", "offset": size, "index": None})
    value = Pairs(((index, [Name("torch", "bfloat16"), size]),))
    assert pickle.loads(write_pickle(value)) == {MetadataIndex("w", [2, 3]): [torch.bfloat16, torch.Size([2, 3])]}


def test_torch_s_own_metadata_is_read() -> None:
    import torch
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    size = torch.Size([4, 2])
    chunks = [ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=size)]
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), size, chunks)
    whole = Metadata({"w": tensor, "o": BytesStorageMetadata()}, storage_data={MetadataIndex("w", [0, 0]): 1})
    out = io.BytesIO()
    pickle.dump(whole, out)
    found = read_pickle(out.getvalue(), "x")
    assert found.state_dict_metadata["w"].size == (4, 2)
    assert found.state_dict_metadata["w"].properties.state[0] == "bfloat16"
    assert found.state_dict_metadata["w"].chunks[0].sizes == (4, 2)
    ((index, _),) = found.storage_data.items()
    assert (index.fqn, index.offset) == ("w", (0, 0))
