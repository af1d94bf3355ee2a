"""Reader of torch_dist directories (torch.distributed.checkpoint), for any parallel layout of the writer.

A tensor `[layers, out, in]` is tiled by chunks with `offsets` and `sizes` along every dimension. A slice `tensor[index]`
is read as an `ExtentView`: one extent per chunk. Chunks of row-parallel weights have `left > 0`.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import Extent, ExtentView
from shared.checkpoint.dtypes import BY_NAME, Dtype
from shared.checkpoint.formats.torch_archive import MAX_DATA, StoredTensor, find_tensor, tensor_archive
from shared.checkpoint.formats.torch_pickle import read_pickle
from shared.errors import UserError
from shared.mapping.layout import Shape

Places = dict[tuple[str, Shape | None], Any]  # (key, chunk offsets) -> storage info

# Entries of a training checkpoint other than weights.
NON_WEIGHT_PREFIXES = ("optimizer", "rng_state", "opt_param_scheduler", "rerun_state_machine", "common_state", "scaler")
_GATE, _UP = "_w", "_v"  # key suffixes of the halves of a gated fc1


@dataclass(kw_only=True)
class Chunk:
    """A chunk of a tensor, in one file."""

    offsets: Shape
    sizes: Shape
    file: Path
    start: int
    length: int
    stored: StoredTensor | None = field(default=None, repr=False)  # located on first use


@dataclass(frozen=True, kw_only=True)
class DistTensor:
    """A global tensor, from `.metadata`."""

    key: str
    dtype: Dtype
    shape: Shape
    chunks: tuple[Chunk, ...] = field(repr=False)
    place: str

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.size


_EMPTY_PICKLE = 512  # bytes: None, an empty tensor or an empty buffer take less


class TorchDistReader:
    """The tensors of one iteration.

    Raises:
        UserError: `.metadata` is damaged or names unknown classes; a file is missing or truncated; chunks do not tile
            their tensor.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = OpenFiles()
        self._indexed: dict[tuple[str, int], dict[Shape, list[Chunk]]] = {}
        path = directory / ".metadata"
        if not path.is_file():
            raise UserError(f"{path} is missing: not a complete torch_dist checkpoint")
        metadata = read_pickle(path.read_bytes(), path)
        try:
            states, stored = dict(metadata.state_dict_metadata), dict(metadata.storage_data)
            places = {(index.fqn, getattr(index, "offset", None)): info for index, info in stored.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a torch.distributed.checkpoint metadata file: {error}") from None
        self.objects = {key for key, state in states.items() if not hasattr(state, "size")}
        self._states = {
            key: places[key, None] for key in self.objects if "._extra_state/" in key and (key, None) in places
        }
        self.tensors: dict[str, DistTensor] = {}
        self.non_weights: dict[str, str] = {}  # tensors other than weights: key -> dtype
        for key, state in states.items():
            if key in self.objects:
                continue
            dtype = state.properties.state[0]
            if key.startswith(NON_WEIGHT_PREFIXES):
                self.non_weights[key] = dtype
            elif dtype not in BY_NAME:
                raise UserError(f"{path}: {key} is {dtype}; bfloat16, float16, float32 or float64 is required")
            else:
                self.tensors[key] = self._tensor(key, state, places)
        for key in [key for key in self.tensors if key.endswith(_GATE) and key[: -len(_GATE)] + _UP in self.tensors]:
            self._join(key[: -len(_GATE)])

    def fp8_states(self) -> list[str]:
        """Keys of FP8 states (scales, amax histories): of `_extra_state` objects that hold something. None is unpickled.

        An object is an archive of `torch.save`: the bytes of tensors are apart from the pickle, which is 4 bytes long for None.
        """
        found = []
        for key, info in sorted(self._states.items()):
            with (self.directory / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                content = file.read(info.length)
            try:
                entries = zipfile.ZipFile(io.BytesIO(content)).infolist()
            except zipfile.BadZipFile:
                continue  # no archive of torch.save: not a state of FP8
            data = sum(entry.file_size for entry in entries if "/data/" in entry.filename)
            if data or any(
                entry.filename.endswith("/data.pkl") and entry.file_size > _EMPTY_PICKLE for entry in entries
            ):
                found.append(key)
        return found

    def _join(self, key: str) -> None:
        """Join the halves of a gated fc1, `[gate ; up]`, that `singleton_local_shards` stores under two keys."""
        gate, up = (self.tensors.pop(key + half) for half in (_GATE, _UP))
        if (gate.dtype, gate.shape) != (up.dtype, up.shape):
            raise UserError(
                f"{gate.place}: {gate.key} and {up.key} differ in dtype or shape; write the checkpoint again"
            )
        rows, *columns = gate.shape
        shifted = (replace(chunk, offsets=(chunk.offsets[0] + rows, *chunk.offsets[1:])) for chunk in up.chunks)
        self.tensors[key] = replace(gate, key=key, shape=(2 * rows, *columns), chunks=(*gate.chunks, *shifted))

    def _tensor(self, key: str, state: Any, places: Places) -> DistTensor:
        dtype, shape, chunks = BY_NAME[state.properties.state[0]], tuple(state.size), []
        for chunk in state.chunks:
            info = places.get((key, chunk.offsets))
            if info is None:
                raise UserError(f"{self.directory}/.metadata: {key} at {list(chunk.offsets)} is in no file")
            file = self.directory / info.relative_path
            if file.parent != self.directory or not file.is_file():
                raise UserError(f"{file} is missing, though .metadata names it; fetch the checkpoint again")
            if info.offset + info.length > file.stat().st_size:
                raise UserError(f"{file} is truncated: {key} extends past its end; fetch the checkpoint again")
            chunks.append(
                Chunk(offsets=chunk.offsets, sizes=chunk.sizes, file=file, start=info.offset, length=info.length)
            )
        covered = sum(prod(chunk.sizes) for chunk in chunks)
        if covered != prod(shape):
            raise UserError(
                f"{self.directory}/.metadata: the chunks of {key} hold {covered} of {prod(shape)} elements; "
                "the file of a rank is missing, fetch or write the checkpoint again"
            )
        return DistTensor(key=key, dtype=dtype, shape=shape, chunks=tuple(chunks), place=str(self.directory))

    def rows(self, key: str, index: Shape, first: int, count: int) -> Iterator[memoryview]:
        """Rows `first` to `first + count` of `tensor[index]` in blocks of whole rows.

        A block is valid until the next is requested.
        """
        if len(self.tensors[key].shape) - len(index) > 2:
            for place in range(first, first + count):
                yield from self.rows(key, (*index, place), 0, self.tensors[key].shape[len(index) + 1])
            return
        yield from self.view(key, index).blocks(self._files, first, count)

    def view(self, key: str, index: Shape) -> ExtentView:
        """The view of `tensor[index]`."""
        tensor, axis = self.tensors[key], len(index)
        rest, size = tensor.shape[axis + 1 :], tensor.dtype.size
        extents = []
        for chunk in self._chunks_at(tensor, index):
            if chunk.sizes[axis + 2 :] != tensor.shape[axis + 2 :]:
                raise UserError(
                    f"{tensor.place}: {key} is split along the last dimensions of a slice, which is not supported"
                )
            inner = prod(rest[1:]) * size  # bytes of one column
            columns, left = (chunk.sizes[axis + 1], chunk.offsets[axis + 1]) if rest else (1, 0)
            row, rows = chunk.offsets[axis], chunk.sizes[axis]
            width = columns * inner
            start = self._data_start(tensor, chunk) + _slice_number(chunk, index) * rows * width
            extents.append(Extent(file=chunk.file, start=start, row=row, rows=rows, left=left * inner, width=width))
        extents.sort(key=lambda extent: (extent.row, extent.left))
        return ExtentView(name=key, rows=tensor.shape[axis], width=prod(rest) * size, extents=tuple(extents))

    @property
    def splits_columns(self) -> bool:
        """Whether any tensor is split along its last dimension (row-parallel weights)."""
        return any(
            chunk.sizes[-1] != tensor.shape[-1]
            for tensor in self.tensors.values()
            for chunk in tensor.chunks
            if chunk.sizes
        )

    def files_of(self, key: str, index: Shape) -> frozenset[Path]:
        """The files with a chunk of `tensor[index]`."""
        return frozenset(chunk.file for chunk in self._chunks_at(self.tensors[key], index))

    def _chunks_at(self, tensor: DistTensor, index: Shape) -> list[Chunk]:
        """The chunks of `tensor[index]`. Large models have tens of thousands of chunks, hence a lookup table."""
        axis = len(index)
        if (tensor.key, axis) not in self._indexed:
            lookup: dict[Shape, list[Chunk]] = {}
            for chunk in tensor.chunks:
                ranges = zip(chunk.offsets[:axis], chunk.sizes[:axis], strict=True)
                for place in product(*(range(offset, offset + size) for offset, size in ranges)):
                    lookup.setdefault(place, []).append(chunk)
            self._indexed[tensor.key, axis] = lookup
        return self._indexed[tensor.key, axis].get(index, [])

    def _data_start(self, tensor: DistTensor, chunk: Chunk) -> int:
        """Byte offset of a chunk's first element."""
        if chunk.stored is None:
            chunk.stored = self._standard_archive(tensor, chunk)
        if chunk.stored is None:
            stored = find_tensor(self._files, chunk.file, chunk.start, chunk.length)
            if stored.shape != chunk.sizes or stored.dtype is not tensor.dtype:
                raise UserError(
                    f"{chunk.file}: {tensor.key} is {stored.dtype.name}{list(stored.shape)}, "
                    f".metadata says {tensor.dtype.name}{list(chunk.sizes)}; the checkpoint is damaged"
                )
            chunk.stored = stored
        return chunk.stored.start

    def _standard_archive(self, tensor: DistTensor, chunk: Chunk) -> StoredTensor | None:
        """Location of the data in an archive written by Baton: the prefix is compared, no zip is parsed."""
        if prod(chunk.sizes) * tensor.dtype.size >= MAX_DATA:
            return None
        archive = tensor_archive(tensor.dtype, chunk.sizes)
        if chunk.length != archive.size:
            return None
        if self._files.read(chunk.file, chunk.start, len(archive.prefix)) != archive.prefix:
            return None
        return StoredTensor(dtype=tensor.dtype, shape=chunk.sizes, start=chunk.start + len(archive.prefix))

    def common(self) -> dict[str, Any]:
        """The content of `common.pt`; empty if the checkpoint has none."""
        path = self.directory / "common.pt"
        if not path.is_file():
            return {}
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            return dict(read_pickle(archive.read(name), path))

    @property
    def bytes(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())


def _slice_number(chunk: Chunk, index: Shape) -> int:
    """Position of slice `index` in its chunk, row-major."""
    inside = 0
    for place, offset, size in zip(index, chunk.offsets, chunk.sizes, strict=False):
        inside = inside * size + place - offset
    return inside
