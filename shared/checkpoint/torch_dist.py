"""Reads a torch_dist directory tensor by tensor, however the ranks that wrote it had cut the tensors up.

A tensor is a tiling of boxes (chunks). Rows are gathered from the boxes that meet them: in one piece where a box spans
the row, column run by column run where tensor parallelism cut the columns.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from shared.checkpoint.blocks import BLOCK, Files
from shared.checkpoint.dtypes import BY_NAME, Dtype
from shared.checkpoint.torch_archive import StoredTensor, find_tensor
from shared.checkpoint.torch_pickle import read_pickle
from shared.errors import UserError
from shared.mapping.layout import Shape

Places = dict[tuple[str, Shape | None], Any]  # (key, offsets of a chunk) -> where it lies

# Entries of a training checkpoint that are no weights of the model.
NOT_WEIGHTS = ("optimizer", "rng_state", "opt_param_scheduler", "rerun_state_machine", "common_state", "scaler")


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
        self._files = Files()
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
        self.other: dict[str, str] = {}  # tensors that are no weights of a model, with their types
        for key, state in states.items():
            if key in self.objects:
                continue
            dtype = state.properties.state[0]
            if key.startswith(NOT_WEIGHTS):
                self.other[key] = dtype
            elif dtype not in BY_NAME:
                raise UserError(f"{path}: {key} is {dtype}; weights of bfloat16, float16 or float32 are wanted")
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
        tensor, axis = self.tensors[key], len(index)
        columns = prod(tensor.shape[axis + 1 :])
        row_bytes = columns * tensor.dtype.size
        meeting = [chunk for chunk in self._at(tensor, index) if _meets(chunk, axis, first, count)]
        edges = {first, first + count}
        for chunk in meeting:
            edges |= {chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]}
        cuts = sorted(edge for edge in edges if first <= edge <= first + count)
        for start, stop in pairwise(cuts):
            band = [c for c in meeting if c.offsets[axis] <= start and c.offsets[axis] + c.sizes[axis] >= stop]
            if len(band) == 1 and band[0].sizes[axis + 1 :] == tensor.shape[axis + 1 :]:
                position = self._position(tensor, band[0], index, start)
                yield from self._files.blocks(band[0].file, position, (stop - start) * row_bytes, row_bytes)
            else:
                yield from self._gather(tensor, band, index, start, stop)

    def _gather(
        self, tensor: DistTensor, band: list[Chunk], index: Shape, start: int, stop: int
    ) -> Iterator[memoryview]:
        """Rows whose columns lie in several chunks."""
        axis, size = len(index), tensor.dtype.size
        if len(tensor.shape) != axis + 2 or sum(chunk.sizes[axis + 1] for chunk in band) != tensor.shape[axis + 1]:
            raise UserError(f"{tensor.place}: {tensor.key} is cut up in a way that is not supported")
        width = tensor.shape[axis + 1] * size
        step = max(BLOCK // width, 1)
        for row in range(start, stop, step):
            rows = min(step, stop - row)
            block = np.empty((rows, width), dtype=np.uint8)
            for chunk in band:
                left, run = chunk.offsets[axis + 1] * size, chunk.sizes[axis + 1] * size
                piece = self._files.read(chunk.file, self._position(tensor, chunk, index, row), rows * run)
                block[:, left : left + run] = np.frombuffer(piece, dtype=np.uint8).reshape(rows, run)
            yield memoryview(block).cast("B")

    def _at(self, tensor: DistTensor, index: Shape) -> list[Chunk]:
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

    def _position(self, tensor: DistTensor, chunk: Chunk, index: Shape, row: int) -> int:
        """Byte in its file of a row of a chunk."""
        if chunk.stored is None:
            chunk.stored = find_tensor(self._files, chunk.file, chunk.start, chunk.length)
            if chunk.stored.shape != chunk.sizes or chunk.stored.dtype is not tensor.dtype:
                raise UserError(
                    f"{chunk.file}: {tensor.key} is {chunk.stored.dtype.name}{list(chunk.stored.shape)}, "
                    f".metadata says {tensor.dtype.name}{list(chunk.sizes)}; the checkpoint is damaged"
                )
        inside = 0
        for place, offset, size in zip((*index, row), chunk.offsets, chunk.sizes, strict=False):
            inside = inside * size + place - offset
        return chunk.stored.start + inside * prod(chunk.sizes[len(index) + 1 :]) * tensor.dtype.size

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


def _meets(chunk: Chunk, axis: int, first: int, count: int) -> bool:
    start = chunk.offsets[axis]
    return start < first + count and start + chunk.sizes[axis] > first
