"""Writes a torch_dist directory as Megatron-Core's `dist_checkpointing` does, without a model or a process group.

Tensors are concatenated torch.save archives in `__0_<n>.distcp`; `.metadata`, which says where each lies, is last.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.checkpoint.blocks import HashedFile
from shared.checkpoint.dtypes import Dtype
from shared.checkpoint.torch_archive import object_archive, tensor_archive
from shared.checkpoint.torch_pickle import Call, Instance, Name, Pairs, write_pickle
from shared.mapping.layout import Shape

CHUNK_BYTES = 128 << 20  # a reader takes whole chunks, so this bounds what it holds beyond what it wants
_FILE_BYTES = 4 << 30
_METADATA = "torch.distributed.checkpoint.metadata"
_SIZE = Name("torch", "Size")
_STRIDED = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = Call(Name(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
# torch_dist of core 0.16 to 0.19; common.pt is the form that all of them read.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(kw_only=True)
class _Tensor:
    dtype: Dtype
    shape: Shape
    chunks: list[tuple[Shape, Shape]] = field(default_factory=list)  # (offsets, sizes)


class TorchDistWriter:
    """Tensors chunk by chunk into one directory.

    Args:
        directory: an existing, empty directory.
        record: told each data file's name and content hash.
    """

    def __init__(self, directory: Path, record: Callable[[str, str], None]) -> None:
        self._directory, self._record = directory, record
        self._tensors: dict[str, _Tensor] = {}
        self._objects: list[str] = []
        self._stored: list[tuple[str, Shape | None, str, int, int]] = []  # key, offsets, file, offset, length
        self._file: HashedFile | None = None
        self._files = 0

    def declare(self, key: str, dtype: Dtype, shape: Shape) -> None:
        """A tensor's type and whole shape, before its chunks."""
        assert key not in self._tensors, key
        self._tensors[key] = _Tensor(dtype=dtype, shape=shape)

    def chunk(self, key: str, offsets: Shape, sizes: Shape, blocks: Iterable[memoryview]) -> None:
        """One box of a declared tensor: its bytes, row-major."""
        tensor = self._tensors[key]
        archive = tensor_archive(tensor.dtype, sizes)
        file = self._next_file()
        start, crc = file.position, 0
        file.write(archive.prefix)
        data = file.position
        for block in blocks:
            crc = zlib.crc32(block, crc)
            file.write(block)
        assert file.position - data == archive.data_size, f"{key}{offsets}: {file.position - data} bytes"
        file.write(archive.suffix(crc))
        tensor.chunks.append((offsets, sizes))
        self._stored.append((key, offsets, file.path.name, start, file.position - start))

    def put_object(self, key: str, value: Any) -> None:
        """A plain value under a key of its own."""
        file = self._next_file()
        start = file.position
        file.write(object_archive(value))
        self._objects.append(key)
        self._stored.append((key, None, file.path.name, start, file.position - start))

    def finish(self, common: dict[str, Any]) -> None:
        """Write what makes it a checkpoint; `.metadata` last, without which nobody reads it."""
        self._close()
        (self._directory / "common.pt").write_bytes(object_archive(common))
        (self._directory / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
        (self._directory / ".metadata").write_bytes(write_pickle(self._metadata()))

    def _next_file(self) -> HashedFile:
        if self._file is not None and self._file.position >= _FILE_BYTES:
            self._close()
        if self._file is None:
            self._file = HashedFile(self._directory / f"__0_{self._files}.distcp")
            self._files += 1
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._record(self._file.path.name, self._file.close())
            self._file = None

    def _metadata(self) -> Instance:
        states: dict[str, Instance] = {}
        for key, tensor in self._tensors.items():
            chunks = [
                Instance(Name(_METADATA, "ChunkStorageMetadata"), {"offsets": _size(offsets), "sizes": _size(sizes)})
                for offsets, sizes in tensor.chunks
            ]
            properties = (Name("torch", tensor.dtype.name), _STRIDED, False, _CONTIGUOUS, False)
            state = {
                "properties": Instance(Name(_METADATA, "TensorProperties"), properties),
                "size": _size(tensor.shape),
                "chunks": chunks,
            }
            states[key] = Instance(Name(_METADATA, "TensorStorageMetadata"), state)
        for key in self._objects:
            states[key] = Instance(Name(_METADATA, "BytesStorageMetadata"), {})
        stored = tuple(
            (
                Instance(
                    Name(_METADATA, "MetadataIndex"),
                    {"fqn": key, "index": None, "offset": None if offsets is None else _size(offsets)},
                ),
                Instance(
                    Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
                    {"relative_path": file, "offset": offset, "length": length},
                ),
            )
            for key, offsets, file, offset, length in self._stored
        )
        return Instance(
            Name(_METADATA, "Metadata"),
            {"state_dict_metadata": states, "planner_data": None, "storage_data": Pairs(stored), "storage_meta": None},
        )


def _size(shape: Shape) -> Call:
    return Call(_SIZE, (shape,))
