"""Byte views: a tensor as a matrix of bytes `[rows, width]`, read in windows of rows and columns.

`rows`: length of the first dimension. `width`: bytes per row. `left`: byte offset within a row. Views have no dtype. A view
is stored (`ExtentView`), composed of views (`ConcatenatedView`, `StridedView`), or computed on read (shared/quantized).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shared.checkpoint.copy import blocks
from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.errors import UserError

if TYPE_CHECKING:
    import numpy as np


class ByteView(Protocol):
    """A readable matrix of bytes `[rows, width]`."""

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def width(self) -> int:
        """Bytes per row."""
        ...

    def read(self, files: OpenFiles, row: int, rows: int, left: int, width: int, out: memoryview) -> None:
        """Fill `out`, of `rows * width` bytes, with the window `[row : row + rows, left : left + width]`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """A contiguous range of a file: the window `[row : row + rows, left : left + width]` of a view."""

    file: Path
    start: int  # byte offset in the file
    row: int
    rows: int
    left: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtentView:
    """A view tiled by extents. `left > 0` comes from row-parallel weights, split along the columns."""

    name: str  # the tensor's, for messages
    rows: int
    width: int
    extents: tuple[Extent, ...]

    def read(self, files: OpenFiles, row: int, rows: int, left: int, width: int, out: memoryview) -> None:
        """Fill `out`, of `rows * width` bytes, with the window `[row : row + rows, left : left + width]`."""
        filled = 0
        for extent in self.extents:
            top, bottom = max(row, extent.row), min(row + rows, extent.row + extent.rows)
            start, stop = max(left, extent.left), min(left + width, extent.left + extent.width)
            if top >= bottom or start >= stop:
                continue
            run, count = stop - start, bottom - top
            filled += run * count
            source = extent.start + (top - extent.row) * extent.width + start - extent.left
            place = (top - row) * width + start - left
            if run == width and (run == extent.width or count == 1):
                files.read_into(extent.file, source, out[place : place + count * run])
            elif run == extent.width:
                piece = memoryview(bytearray(count * run))
                files.read_into(extent.file, source, piece)
                _scatter(piece, out[(top - row) * width : (bottom - row) * width], width, start - left, run)
            else:
                for _ in range(count):
                    files.read_into(extent.file, source, out[place : place + run])
                    source, place = source + extent.width, place + width
        if filled != rows * width:
            raise UserError(
                f"{self.name}: the chunks hold {filled} of {rows * width} bytes of rows {row} to {row + rows}; "
                "the checkpoint is damaged, fetch or write it again"
            )

    def blocks(self, files: OpenFiles, row: int, rows: int) -> Iterator[memoryview]:
        """Whole rows in blocks of bounded size. A block is valid until the next is requested."""
        step = max(blocks.BLOCK // max(self.width, 1), 1)
        buffer = memoryview(bytearray(min(step, rows) * self.width))
        for first in range(row, row + rows, step):
            count = min(step, row + rows - first)
            block = buffer[: count * self.width]
            self.read(files, first, count, 0, self.width, block)
            yield block


def view_of(tensor: TensorInfo) -> ExtentView:
    """The view of a tensor stored in one file."""
    rows = tensor.shape[0] if tensor.shape else 1
    extent = Extent(file=tensor.file, start=tensor.start, row=0, rows=rows, left=0, width=tensor.row_bytes)
    return ExtentView(name=tensor.name, rows=rows, width=tensor.row_bytes, extents=(extent,))


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRange:
    """Rows `[row : row + rows]` of a view; they become rows `target_row`, `target_row + step`, ... of the result."""

    view: ByteView
    row: int
    rows: int
    target_row: int
    step: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ConcatenatedView:
    """Rows of several views as one: concatenated (`step=1`) or interleaved."""

    name: str
    rows: int
    width: int
    parts: tuple[RowRange, ...]

    def read(self, files: OpenFiles, row: int, rows: int, left: int, width: int, out: memoryview) -> None:
        """As `ByteView.read`."""
        for part in self.parts:
            first = max(-(-(row - part.target_row) // part.step), 0)  # the part's rows inside the window
            count = min(-(-(row + rows - part.target_row) // part.step), part.rows) - first
            top = part.target_row + first * part.step - row
            if count > 0 and part.step == 1:
                place = out[top * width : (top + count) * width]
                part.view.read(files, part.row + first, count, left, width, place)
            elif count > 0:
                piece = memoryview(bytearray(count * width))
                part.view.read(files, part.row + first, count, left, width, piece)
                _strided_rows(out, top, part.step, width)[:count] = _strided_rows(piece, 0, 1, width)


@dataclass(frozen=True, kw_only=True, slots=True)
class StridedView:
    """Rows `first`, `first + step`, ... of a view: the inverse of interleaving."""

    view: ByteView
    first: int
    rows: int
    step: int

    @property
    def name(self) -> str:
        return self.view.name

    @property
    def width(self) -> int:
        """As `ByteView.width`."""
        return self.view.width

    def read(self, files: OpenFiles, row: int, rows: int, left: int, width: int, out: memoryview) -> None:
        """As `ByteView.read`."""
        span = (rows - 1) * self.step + 1
        piece = memoryview(bytearray(span * width))
        self.view.read(files, self.first + row * self.step, span, left, width, piece)
        _strided_rows(out, 0, 1, width)[:] = _strided_rows(piece, 0, self.step, width)


def _strided_rows(data: memoryview, first: int, step: int, width: int) -> np.ndarray:
    """`[rows, width]` bytes, every `step`-th row from `first`."""
    import numpy as np

    return np.frombuffer(data, dtype=np.uint8).reshape(-1, width)[first::step]


def _scatter(piece: memoryview, out: memoryview, width: int, left: int, run: int) -> None:
    """Copy rows of `run` bytes into rows of `width` bytes at offset `left`."""
    import numpy as np  # imported here: only tensors with split columns need it

    window = np.frombuffer(out, dtype=np.uint8).reshape(-1, width)
    window[:, left : left + run] = np.frombuffer(piece, dtype=np.uint8).reshape(-1, run)
