"""One safetensors file: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps.

Read and written without the safetensors library: headers are reproduced byte for byte, data is copied in ranges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from shared.checkpoint.dtypes import SAFETENSORS_BITS
from shared.checkpoint.files import check_not_stand_in
from shared.errors import UserError
from shared.mapping.layout import Shape

_LENGTH = 8
_MAX_HEADER = 100_000_000  # bytes; the safetensors library's limit


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Location of a stored tensor."""

    name: str
    dtype: str  # safetensors' name
    shape: Shape
    file: Path
    start: int  # byte offset in the file
    size: int  # bytes

    @property
    def place(self) -> str:
        return str(self.file)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, an index of the first dimension."""
        return self.size // self.shape[0] if self.shape and self.shape[0] else self.size


@dataclass(frozen=True, kw_only=True)
class Header:
    """A file's header."""

    text: str  # verbatim, padding included
    metadata: Mapping[str, str] | None
    tensors: tuple[TensorInfo, ...]  # in file order


def read_header(path: Path) -> Header:
    """The header of a file; UserError if it is damaged or disagrees with the file's size."""
    check_not_stand_in(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if size < _LENGTH or length > min(size - _LENGTH, _MAX_HEADER):
            raise UserError(f"{path} is not a safetensors file, or is truncated; fetch it again")
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(parsed, dict):
            raise ValueError("not an object")
        metadata = parsed.pop("__metadata__", None)
    except _Duplicate as error:
        raise UserError(f"{path}: duplicate tensor {error}; the file is damaged, fetch it again") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its header is not JSON; fetch it again") from None
    return Header(text=text, metadata=metadata, tensors=_tensors(path, parsed, _LENGTH + length, size))


def encode_header(tensors: Sequence[tuple[str, str, Shape]], metadata: Mapping[str, str] | None) -> str:
    """A header for (name, dtype, shape) in this order, padded to a multiple of 8 bytes as the library does."""
    content: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in tensors:
        stop = position + tensor_bytes(dtype, shape)
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


def parse_header(text: str, path: Path) -> Header:
    """`read_header` for a header stored apart from its file."""
    parsed = json.loads(text, object_pairs_hook=_unique)
    metadata = parsed.pop("__metadata__", None)
    start = _LENGTH + len(text.encode())
    end = start + max((entry["data_offsets"][1] for entry in parsed.values()), default=0)
    return Header(text=text, metadata=metadata, tensors=_tensors(path, parsed, start, end))


def weight_map_of(index: Path, flag: str) -> dict[str, str]:
    """The `weight_map` of an index, tensor name -> file name; UserError if the index is damaged."""
    check_not_stand_in(index, flag)
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        names = None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{flag} {index} is not a weight index; fetch it again")
    return names


def header_bytes(text: str) -> bytes:
    """Length prefix and header."""
    raw = text.encode()
    return len(raw).to_bytes(_LENGTH, "little") + raw


def tensor_bytes(dtype: str, shape: Shape) -> int:
    """Bytes of a tensor's data."""
    return prod(shape) * SAFETENSORS_BITS[dtype] // 8


class _Duplicate(Exception):  # noqa: N818 -- carries a name to the caller
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Duplicate(next(name for name in names if names.count(name) > 1))
    return result


def _tensors(path: Path, parsed: Mapping[str, Any], data: int, size: int) -> tuple[TensorInfo, ...]:
    found = []
    for name, entry in parsed.items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            start, stop = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: its header does not describe tensor {name}; fetch it again") from None
        if dtype not in SAFETENSORS_BITS:
            raise UserError(
                f"{path}: {name} has dtype {dtype}, which this tool does not read; upgrade this tool, or save it in another dtype"
            )
        if stop - start != tensor_bytes(dtype, shape):
            raise UserError(f"{path}: {name} is {dtype}{list(shape)} in {stop - start} bytes; fetch the file again")
        found.append(TensorInfo(name=name, dtype=dtype, shape=shape, file=path, start=data + start, size=stop - start))
    found.sort(key=lambda tensor: (tensor.start, tensor.start + tensor.size))
    position = data
    for tensor in found:
        if tensor.start != position:
            raise UserError(f"{path}: {tensor.name} does not begin at the end of the tensor before it; fetch it again")
        position += tensor.size
    if position != size:
        kind = "is truncated" if size < position else "has trailing bytes"
        raise UserError(f"{path} {kind}: {size} bytes instead of {position}; fetch it again")
    return tuple(found)
