"""Reads a torch_dist directory tensor by tensor, however the ranks that wrote it had cut the tensors up.

A tensor is a tiling of boxes (chunks). Rows are gathered from the boxes that meet them: in one piece where a box spans
the row, column run by column run where tensor parallelism cut the columns.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
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

Places = dict[tuple[str, Shape | None], Any]  # (key, offsets of a chunk) -> where it lies

# Entries of a training checkpoint that are no weights of the model.
NON_WEIGHT_PREFIXES = ("optimizer", "rng_state", "opt_param_scheduler", "rerun_state_machine", "common_state", "scaler")


@dataclass(kw_only=True)
class Chunk:
    """A box of a tensor in a file."""

    offsets: Shape
    sizes: Shape
    file: Path
    start: int
    length: int
    stored: StoredTensor | None = field(default=None, repr=False)  # found on first use


@dataclass(frozen=True, kw_only=True)
class DistTensor:
    """A whole tensor, as the directory's metadata describes it."""

    key: str
    dtype: Dtype
    shape: Shape
    chunks: tuple[Chunk, ...] = field(repr=False)
    place: str

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.size


class TorchDistReader:
    """The tensors of one iteration.

    Raises UserError for metadata that names anything but a checkpoint's classes, for files that are missing or too
    short, and for chunks that do not tile their tensor.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = OpenFiles()
        self._indexed: dict[tuple[str, int], dict[Shape, list[Chunk]]] = {}
        path = directory / ".metadata"
        if not path.is_file():
            raise UserError(f"{path} is missing: not a whole torch_dist checkpoint")
        metadata = read_pickle(path.read_bytes(), path)
        try:
            states, stored = dict(metadata.state_dict_metadata), dict(metadata.storage_data)
            places = {(index.fqn, getattr(index, "offset", None)): info for index, info in stored.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a torch.distributed.checkpoint metadata file: {error}") from None
        self.objects = {key for key, state in states.items() if not hasattr(state, "size")}
        self.tensors: dict[str, DistTensor] = {}
        self.non_weights: dict[str, str] = {}  # tensors that are no weights of a model, with their types
        for key, state in states.items():
            if key in self.objects:
                continue
            dtype = state.properties.state[0]
            if key.startswith(NON_WEIGHT_PREFIXES):
                self.non_weights[key] = dtype
            elif dtype not in BY_NAME:
                raise UserError(
                    f"{path}: {key} is {dtype}; weights of bfloat16, float16, float32 or float64 are wanted"
                )
            else:
                self.tensors[key] = self._tensor(key, state, places)

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
                raise UserError(f"{file} is cut short: {key} ends behind it; fetch the checkpoint again")
            chunks.append(
                Chunk(offsets=chunk.offsets, sizes=chunk.sizes, file=file, start=info.offset, length=info.length)
            )
        covered = sum(prod(chunk.sizes) for chunk in chunks)
        if covered != prod(shape):
            raise UserError(
                f"{self.directory}/.metadata: the chunks of {key} hold {covered} of {prod(shape)} numbers; "
                "not every rank's file is there"
            )
        return DistTensor(key=key, dtype=dtype, shape=shape, chunks=tuple(chunks), place=str(self.directory))

    def rows(self, key: str, index: Shape, first: int, count: int) -> Iterator[memoryview]:
        """Bytes of rows `first` to `first + count` of `tensor[index]`, in blocks of whole rows.

        A block is valid until the next one is asked for.
        """
        if len(self.tensors[key].shape) - len(index) > 2:
            for place in range(first, first + count):
                yield from self.rows(key, (*index, place), 0, self.tensors[key].shape[len(index) + 1])
            return
        yield from self.view(key, index).blocks(self._files, first, count)

    def view(self, key: str, index: Shape) -> ExtentView:
        """Where the rows of `tensor[index]` lie."""
        tensor, axis = self.tensors[key], len(index)
        rest, size = tensor.shape[axis + 1 :], tensor.dtype.size
        extents = []
        for chunk in self._chunks_at(tensor, index):
            if chunk.sizes[axis + 2 :] != tensor.shape[axis + 2 :]:
                raise UserError(f"{tensor.place}: {key} is cut up in a way that is not supported")
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
        """Whether a chunk of any tensor has less than whole rows."""
        return any(
            chunk.sizes[-1] != tensor.shape[-1]
            for tensor in self.tensors.values()
            for chunk in tensor.chunks
            if chunk.sizes
        )

    def files_of(self, key: str, index: Shape) -> frozenset[Path]:
        """The files that hold a part of `tensor[index]`."""
        return frozenset(chunk.file for chunk in self._chunks_at(self.tensors[key], index))

    def _chunks_at(self, tensor: DistTensor, index: Shape) -> list[Chunk]:
        """The chunks that meet `tensor[index]`, looked up: large models have tens of thousands."""
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
        """Byte in its file of a chunk's first number."""
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
        """Where the numbers are if the archive begins as this tool's do; one read then tells, of a model's thousands."""
        if prod(chunk.sizes) * tensor.dtype.size >= MAX_DATA:
            return None
        archive = tensor_archive(tensor.dtype, chunk.sizes)
        if chunk.length != archive.size:
            return None
        if self._files.read(chunk.file, chunk.start, len(archive.prefix)) != archive.prefix:
            return None
        return StoredTensor(dtype=tensor.dtype, shape=chunk.sizes, start=chunk.start + len(archive.prefix))

    def common(self) -> dict[str, Any]:
        """The plain values that the checkpoint holds beside its tensors, from `common.pt`; empty where it has none."""
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
    """Which of a chunk's slices `index` is."""
    inside = 0
    for place, offset, size in zip(index, chunk.offsets, chunk.sizes, strict=False):
        inside = inside * size + place - offset
    return inside
