"""Archives readable by torch.load and zip programs; archives of torch.save are located."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.dtypes import BF16, BY_NAME, Dtype
from shared.checkpoint.formats.torch_archive import find_tensor, object_archive, tensor_archive
from shared.errors import UserError


@pytest.mark.parametrize("dtype", BY_NAME.values(), ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 4, 6), (0, 3)])
def test_torch_loads_what_we_write(dtype: Dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(getattr(torch, dtype.name))
    data = tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    archive = tensor_archive(dtype, shape)
    whole = archive.prefix + data + archive.suffix(zlib.crc32(data))
    assert torch.equal(torch.load(io.BytesIO(whole), weights_only=True), tensor)
    assert len(archive.prefix) % 64 == 0
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        assert file.testzip() is None  # names, sizes and checksums


def test_objects() -> None:
    value = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {"a": True}}
    assert torch.load(io.BytesIO(object_archive(value)), weights_only=True) == value
    assert torch.load(io.BytesIO(object_archive([None])), weights_only=True) == [None]


def saved(path: Path, value: object, before: bytes = b"before", after: bytes = b"after") -> tuple[int, int]:
    out = io.BytesIO()
    torch.save(value, out)
    path.write_bytes(before + out.getvalue() + after)
    return len(before), len(out.getvalue())


def test_torch_s_archives_are_found_inside_a_file(tmp_path: Path) -> None:
    tensor = torch.randn(7, 5).to(torch.bfloat16)
    start, size = saved(tmp_path / "f", tensor)
    with OpenFiles() as files:
        found = find_tensor(files, tmp_path / "f", start, size)
        data = files.read(tmp_path / "f", found.start, 70)
    assert (found.dtype, found.shape) == (BF16, (7, 5))
    assert data == tensor.view(torch.uint8).numpy().tobytes()


def test_part_of_a_larger_storage(tmp_path: Path) -> None:
    whole = torch.arange(20, dtype=torch.float32).reshape(5, 4)
    start, size = saved(tmp_path / "f", whole[2:4])
    with OpenFiles() as files:
        found = find_tensor(files, tmp_path / "f", start, size)
        data = files.read(tmp_path / "f", found.start, 32)
    assert data == whole[2:4].numpy().tobytes()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4, 6).T, "not stored contiguously"),
        (torch.zeros(4, dtype=torch.int64), "LongStorage"),
        ([1, 2], "no tensor"),
    ],
)
def test_what_is_no_plain_tensor(tmp_path: Path, value: object, message: str) -> None:
    start, size = saved(tmp_path / "f", value)
    with OpenFiles() as files, pytest.raises(UserError, match=message):
        find_tensor(files, tmp_path / "f", start, size)


def test_damage(tmp_path: Path) -> None:
    start, size = saved(tmp_path / "f", torch.zeros(4))
    with OpenFiles() as files, pytest.raises(UserError, match="no tensor at byte"):
        find_tensor(files, tmp_path / "f", start + 1, size - 30)
