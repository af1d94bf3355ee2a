"""torch.save archives: the bytes around a tensor's data.

An uncompressed zip: `archive/data.pkl` rebuilds the object, `archive/data/0` is its storage, 64-byte aligned. The CRC is
known only after the data is written, so it follows the data in a zip data descriptor.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.dtypes import BY_STORAGE, Dtype
from shared.checkpoint.formats.torch_pickle import Call, Name, Persistent, StorageType, read_pickle, write_pickle
from shared.errors import UserError
from shared.mapping.layout import Shape

_ALIGNMENT = 64
_UTF8, _DESCRIPTOR = 0x0800, 0x0008  # zip flags
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_DESCRIPTOR_MARK = b"PK\x07\x08"
MAX_DATA = (1 << 32) - (1 << 20)  # bytes of one storage; a larger one needs zip64


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: bytes
    size: int
    crc: int
    flags: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Archive:
    """Layout of an archive: `prefix`, the data, `suffix(crc)`."""

    prefix: bytes
    data_size: int
    entries: tuple[_Entry, ...] = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        return len(self.prefix) + self.data_size + len(self.suffix(0))

    def suffix(self, crc: int) -> bytes:
        """The bytes after the data, given its CRC-32."""
        descriptor = b""
        *known, last = self.entries
        if last.flags & _DESCRIPTOR:
            last = replace(last, crc=crc)
            descriptor = struct.pack("<4sIII", _DESCRIPTOR_MARK, crc, self.data_size, self.data_size)
        start = len(self.prefix) + self.data_size + len(descriptor)
        central = b"".join(
            struct.pack(
                "<4s6H3I5H2I",
                *(_CENTRAL, 0, 0, entry.flags, 0, 0, 0, entry.crc, entry.size, entry.size),
                *(len(entry.name), 0, 0, 0, 0, 0, entry.offset),
            )
            + entry.name
            for entry in (*known, last)
        )
        count = len(self.entries)
        return descriptor + central + struct.pack("<4s4H2IH", _END, 0, 0, count, count, len(central), start, 0)


@lru_cache(maxsize=1024)  # many tensors of a model share a shape
def tensor_archive(dtype: Dtype, shape: Shape) -> Archive:
    """The archive of a contiguous tensor."""
    stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = Persistent(("storage", Name("torch", dtype.storage), "0", "cpu", prod(shape)))
    hooks = Call(Name("collections", "OrderedDict"), ())
    rebuild = Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, stride, False, hooks))
    size = prod(shape) * dtype.size
    assert size < MAX_DATA, "larger tensors are split into chunks"
    return _archive(write_pickle(rebuild), size)


def object_archive(value: Any) -> bytes:
    """The archive of an object without tensors."""
    archive = _archive(write_pickle(value), None)
    return archive.prefix + archive.suffix(0)


def _archive(content: bytes, data_size: int | None) -> Archive:
    out, entries = io.BytesIO(), []
    for name, body in ((b"data.pkl", content), (b"byteorder", b"little"), (b"version", b"3\n")):
        entries.append(
            _Entry(name=b"archive/" + name, size=len(body), crc=zlib.crc32(body), flags=_UTF8, offset=out.tell())
        )
        out.write(_local(entries[-1], out.tell()))
        out.write(body)
    if data_size is not None:
        entries.append(
            _Entry(name=b"archive/data/0", size=data_size, crc=0, flags=_UTF8 | _DESCRIPTOR, offset=out.tell())
        )
        out.write(_local(entries[-1], out.tell()))
    return Archive(prefix=out.getvalue(), data_size=data_size or 0, entries=tuple(entries))


def _local(entry: _Entry, position: int) -> bytes:
    """A zip local header. Its extra field pads it: the data starts at a multiple of 64 bytes."""
    late = entry.flags & _DESCRIPTOR
    size = 0 if late else entry.size
    fixed = 30 + len(entry.name) + 4
    padding = -(position + fixed) % _ALIGNMENT
    extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    header = struct.pack(
        "<4s5H3I2H", _LOCAL, 0, entry.flags, 0, 0, 0, 0 if late else entry.crc, size, size, len(entry.name), len(extra)
    )
    return header + entry.name + extra


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Location of a tensor's data in an archive."""

    dtype: Dtype
    shape: Shape
    start: int  # byte offset in the file


class _Slice(io.RawIOBase):
    """A byte range of a file as a file object, for zipfile."""

    def __init__(self, files: OpenFiles, path: Path, start: int, size: int) -> None:
        self._files, self._path, self._start, self._size, self._at = files, path, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        rest = self._size - self._at
        count = rest if size is None or size < 0 else min(size, rest)
        data = self._files.read(self._path, self._start + self._at, count)
        self._at += count
        return data


def find_tensor(files: OpenFiles, path: Path, start: int, size: int) -> StoredTensor:
    """Locate the tensor of the archive at bytes `[start : start + size]`; UserError if it is not contiguous."""
    try:
        with zipfile.ZipFile(_Slice(files, path, start, size)) as archive:
            root = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")
            rebuilt = read_pickle(archive.read(f"{root}data.pkl"), path)
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise UserError(f"{path} is big-endian; save it again on a little-endian machine")
            kind, storage, offset, shape, stride = rebuilt
            _, storage_type, key, _, count = storage
            entry = archive.getinfo(f"{root}data/{key}")
    except (zipfile.BadZipFile, StopIteration, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: no tensor at byte {start} ({error}); the file is damaged, fetch it again") from None
    if kind != "tensor" or not isinstance(storage_type, StorageType) or storage_type.name not in BY_STORAGE:
        raise UserError(f"{path}: the tensor at byte {start} is a {storage_type}; BF16, F16 or F32 is required")
    dtype = BY_STORAGE[storage_type.name]
    wanted = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    plain = all(s == w or n == 1 for s, w, n in zip(stride, wanted, shape, strict=True))
    if not plain or offset + prod(shape) > count or entry.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path}: the tensor at byte {start} is not stored contiguously; save the checkpoint again")
    name_size, extra_size = struct.unpack("<2H", files.read(path, start + entry.header_offset + 26, 4))
    data = start + entry.header_offset + 30 + name_size + extra_size
    if entry.file_size < (offset + prod(shape)) * dtype.size:
        raise UserError(f"{path}: the tensor at byte {start} is truncated; fetch the file again")
    return StoredTensor(dtype=dtype, shape=shape, start=data + offset * dtype.size)


__all__ = ["Archive", "StoredTensor", "find_tensor", "object_archive", "tensor_archive"]
