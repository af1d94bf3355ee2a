"""Headers as the safetensors library writes and reads them, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shared.checkpoint.formats.safetensors_file import encode_header, header_bytes, parse_header, read_header
from shared.errors import UserError

TENSORS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(4, dtype=np.float16)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def write(path: Path, header: Any, data: bytes) -> Path:
    path.write_bytes(header_bytes(header if isinstance(header, str) else json.dumps(header)) + data)
    return path


def test_library_s_file_is_read(file: Path) -> None:
    header = read_header(file)
    assert header.metadata == {"format": "pt"}
    raw = file.read_bytes()
    for tensor in header.tensors:
        assert raw[tensor.start : tensor.start + tensor.size] == TENSORS[tensor.name].tobytes()
        assert tensor.shape == TENSORS[tensor.name].shape
    assert parse_header(header.text, file) == header


def test_our_file_is_read_by_the_library(tmp_path: Path) -> None:
    text = encode_header([("a", "F16", (4,)), ("b", "F32", (2, 3)), ("ü", "F32", (0,))], None)
    assert len(text.encode()) % 8 == 0
    found = load_file(write(tmp_path / "y", text, TENSORS["a"].tobytes() + TENSORS["b"].tobytes()))
    assert set(found) == {"a", "b", "ü"}
    assert np.array_equal(found["b"], TENSORS["b"])


def entry(start: int, stop: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape or [(stop - start) // 4], "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry(0, 8)}, 4, "is truncated"),
        ({"a": entry(0, 8)}, 12, "has trailing bytes"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "b does not begin at"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b does not begin at"),
        ({"a": entry(0, 8, [3])}, 8, r"a is F32\[3\] in 8 bytes"),
        (
            {"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}},
            4,
            "a has dtype F31, which this tool does not read",
        ),
        ({"a": {"dtype": "F32"}}, 0, "does not describe tensor a"),
        ("[1]", 0, "not JSON"),
        ('{"a"', 0, "not JSON"),
        ('{"a": 1, "a": 2}', 0, "duplicate tensor a"),
    ],
)
def test_damage(tmp_path: Path, header: Any, size: int, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(UserError, match=message) as raised:
        read_header(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("size", [0, 7, 8, 20])
def test_file_cut_inside_its_header(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match="truncated"):
        read_header(file)
