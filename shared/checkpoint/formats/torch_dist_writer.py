"""Writer of torch_dist directories as Megatron-Core's `dist_checkpointing` reads them, without a model or process group.

Every chunk is a torch.save archive; `__0_<n>.distcp` is a concatenation of archives; `.metadata`, written last, has the
file, offset and length of each. All are computed beforehand: files and blocks are written in any order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32  # zlib's crc32 is ten times slower: as long as the copy itself

from shared.checkpoint.copy import blocks
from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.operations import Block, CopyOperation, FilePlan, WriteBytes, pack_blocks
from shared.checkpoint.dtypes import Dtype
from shared.checkpoint.formats.torch_archive import object_archive, tensor_archive
from shared.checkpoint.formats.torch_pickle import Call, Instance, Name, Pairs, write_pickle_to
from shared.mapping.layout import Shape

CHUNK_BYTES = 128 << 20  # readers load whole chunks: bounds their memory overhead
_FILES = 64  # target number of files; `--shard` splits by files, so up to as many shards
_SMALLEST, _LARGEST = 256 << 20, 4 << 30  # bytes per file
_METADATA = "torch.distributed.checkpoint.metadata"
_SIZE = Name("torch", "Size")
_STRIDED = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = Call(Name(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
# Read by Megatron-Core 0.16 to 0.19.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """One archive: a tensor chunk, or an object (`offsets` is None)."""

    key: str
    offsets: Shape | None
    sizes: Shape
    size: int  # bytes of the archive
    operations: Callable[[], Iterable[CopyOperation]]
    sources: frozenset[Path]


class TorchDistLayout:
    """Layout of a torch_dist directory: file and offset of every archive."""

    def __init__(self) -> None:
        self._tensors: dict[str, _Tensor] = {}
        self._objects: list[str] = []
        self._stored: list[_Stored] = []

    def declare(self, key: str, dtype: Dtype, shape: Shape) -> None:
        """Declare a tensor with its global shape; `add_chunk` adds its chunks."""
        assert key not in self._tensors, key
        self._tensors[key] = _Tensor(dtype=dtype, shape=shape)

    def add_chunk(
        self,
        key: str,
        offsets: Shape,
        sizes: Shape,
        operations: Callable[[], Iterable[CopyOperation]],
        sources: Iterable[Path] = (),
    ) -> None:
        """Add a chunk of a declared tensor.

        Args:
            key: the tensor's.
            offsets: of the chunk, along every dimension.
            sizes: of the chunk, along every dimension.
            operations: returns the copy operations of its bytes, row-major.
            sources: the source files of these operations.
        """
        tensor = self._tensors[key]
        tensor.chunks.append((offsets, sizes))
        size = tensor_archive(tensor.dtype, sizes).size
        self._stored.append(
            _Stored(key=key, offsets=offsets, sizes=sizes, size=size, operations=operations, sources=frozenset(sources))
        )

    def add_objects(self, keys: Iterable[str], value: Any) -> None:
        """Store the same object, without tensors, under each key."""
        operations = [WriteBytes(object_archive(value))]
        size, sources = operations[0].size, frozenset[Path]()
        for key in keys:
            self._objects.append(key)
            self._stored.append(
                _Stored(key=key, offsets=None, sizes=(), size=size, operations=lambda: operations, sources=sources)
            )

    def files(self) -> list[FilePlan]:
        """Plans of the data files."""
        return [
            FilePlan(
                name=name,
                size=sum(stored.size for stored in archives),
                sources=frozenset().union(*(stored.sources for stored in archives)),
                make_blocks=partial(self._blocks, archives),
            )
            for name, archives in self._assigned()
        ]

    def finish(self, directory: Path, common: dict[str, Any]) -> None:
        """Write `common.pt`, `metadata.json` and, last, `.metadata`. Readers refuse a directory without `.metadata`."""
        (directory / "common.pt").write_bytes(object_archive(common))
        (directory / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
        with (directory / ".metadata").open("wb") as file:
            write_pickle_to(file, self._metadata())

    def _assigned(self) -> Iterator[tuple[str, list[_Stored]]]:
        total = sum(stored.size for stored in self._stored)
        full = min(max(total // _FILES, _SMALLEST), _LARGEST)
        archives: list[_Stored] = []
        size = number = 0
        for stored in self._stored:
            if archives and size + stored.size > full:
                yield f"__0_{number}.distcp", archives
                archives, size, number = [], 0, number + 1
            archives.append(stored)
            size += stored.size
        yield f"__0_{number}.distcp", archives

    def _blocks(self, archives: list[_Stored]) -> Iterator[Block]:
        """Small archives share a block, large ones take several."""
        small: list[CopyOperation] = []
        for stored in archives:
            if stored.offsets is None or stored.size <= blocks.BLOCK:
                small.append(self._archive(stored))
                continue
            yield from pack_blocks(small)
            small = []
            yield from self._large(stored)
        yield from pack_blocks(small)

    def _archive(self, stored: _Stored) -> CopyOperation:
        if stored.offsets is None:
            (operation,) = stored.operations()
            return operation
        return _WriteArchive(size=stored.size, dtype=self._tensors[stored.key].dtype, stored=stored)

    def _large(self, stored: _Stored) -> Iterator[Block]:
        archive = tensor_archive(self._tensors[stored.key].dtype, stored.sizes)
        suffix = len(archive.suffix(0))
        yield from pack_blocks([WriteBytes(archive.prefix)])
        crc = _Crc()
        for block in pack_blocks(stored.operations()):
            yield Block(size=block.size, fill=block.fill, finalize=crc.update, resumable=False)

        def finalize(out: memoryview) -> None:
            out[:] = archive.suffix(crc.value)

        yield Block(size=suffix, fill=lambda files, out: None, finalize=finalize)

    def _metadata(self) -> Instance:
        state = {
            "state_dict_metadata": Pairs(self._states()),
            "planner_data": None,
            "storage_data": Pairs(self._storage()),
            "storage_meta": None,
        }
        return Instance(Name(_METADATA, "Metadata"), state)

    def _states(self) -> Iterator[tuple[str, Instance]]:
        for key, tensor in self._tensors.items():
            chunks = [
                Instance(
                    Name(_METADATA, "ChunkStorageMetadata"),
                    {"offsets": _torch_size(offsets), "sizes": _torch_size(sizes)},
                )
                for offsets, sizes in tensor.chunks
            ]
            properties = (Name("torch", tensor.dtype.name), _STRIDED, False, _CONTIGUOUS, False)
            state = {
                "properties": Instance(Name(_METADATA, "TensorProperties"), properties),
                "size": _torch_size(tensor.shape),
                "chunks": chunks,
            }
            yield key, Instance(Name(_METADATA, "TensorStorageMetadata"), state)
        for key in self._objects:
            yield key, Instance(Name(_METADATA, "BytesStorageMetadata"), {})

    def _storage(self) -> Iterator[tuple[Instance, Instance]]:
        for key, offsets, file, offset, length in self._places():
            index = {"fqn": key, "index": None, "offset": None if offsets is None else _torch_size(offsets)}
            place = {"relative_path": file, "offset": offset, "length": length}
            yield (
                Instance(Name(_METADATA, "MetadataIndex"), index),
                Instance(Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"), place),
            )

    def _places(self) -> Iterator[tuple[str, Shape | None, str, int, int]]:
        for name, archives in self._assigned():
            position = 0
            for stored in archives:
                yield stored.key, stored.offsets, name, position, stored.size
                position += stored.size


class _Crc:
    """Running CRC-32 of one archive's data."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: memoryview) -> None:
        self.value = crc32(data, self.value)


@dataclass(frozen=True, kw_only=True, slots=True)
class _WriteArchive:
    """Copy operation of a complete small archive."""

    size: int
    dtype: Dtype
    stored: _Stored

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        archive = tensor_archive(self.dtype, self.stored.sizes)
        start = position = len(archive.prefix)
        out[:start] = archive.prefix
        for operation in self.stored.operations():
            operation.fill(files, out[position : position + operation.size])
            position += operation.size
        assert position - start == archive.data_size, f"{self.stored.key}: {position - start} bytes"
        out[position:] = archive.suffix(crc32(out[start:position]))


def _torch_size(shape: Shape) -> Call:
    return Call(_SIZE, (shape,))
