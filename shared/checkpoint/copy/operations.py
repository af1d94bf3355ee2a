"""Copy operations: the bytes of an output file as a sequence of independent operations of bounded size.

`copy_rows` and `transpose` split a tensor into operations of at most a block, so memory does not grow with the tensor.
`pack_blocks` groups operations into the blocks a file is written in. Operations run in any order, on any thread.

Shapes: a view is `[rows, width]` in bytes; `row`, `rows`, `first`, `count`, `columns` count elements along one axis;
`step` is a stride in elements of that axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shared.checkpoint.copy import blocks
from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import ByteView
from shared.checkpoint.dtypes import Dtype, add, cast, normalize_row
from shared.errors import UserError

STRIP = 8  # blocks per strip of a transpose, at most
_TILE = 64  # rows transposed at once; source and result fit in a core's cache
_CAST_AT_ONCE = 1 << 18  # elements; bounds the temporary copies of a cast


class CopyOperation(Protocol):
    """Produces `size` bytes of an output file."""

    @property
    def size(self) -> int: ...

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        """Write the bytes into `out`, `size` bytes long."""
        ...


@dataclass(frozen=True, slots=True)
class WriteBytes:
    """Literal bytes."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        out[:] = self.data


@dataclass(frozen=True, slots=True)
class FillValue:
    """One element repeated `count` times."""

    element: bytes
    count: int

    @property
    def size(self) -> int:
        return self.count * len(self.element)

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        out[:] = self.element * self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyRows:
    """The window `[row : row + rows, left : left + width]` of a view, unchanged."""

    view: ByteView
    row: int
    rows: int
    left: int
    width: int

    @property
    def size(self) -> int:
        return self.rows * self.width

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        self.view.read(files, self.row, self.rows, self.left, self.width, out)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransposedRows:
    """A part of a transpose: rows of a view become result columns `column`, `column + step`, ..."""

    view: ByteView
    row: int
    rows: int
    column: int
    step: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Transpose:
    """A strip of a transpose: source columns `first`, `first + step`, ... (`count` of them) become rows `[count, columns]`."""

    parts: tuple[TransposedRows, ...]
    first: int
    count: int
    columns: int  # of the result
    item_bytes: int  # bytes per element
    step: int = 1

    @property
    def size(self) -> int:
        return self.count * self.columns * self.item_bytes

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        import numpy as np  # imported on use: row copies do not need it

        result = np.frombuffer(out, dtype=f"u{self.item_bytes}").reshape(self.count, self.columns)
        span = (self.count - 1) * self.step + 1
        left, width = self.first * self.item_bytes, span * self.item_bytes
        for part in self.parts:
            strip = np.empty(part.rows * width, dtype=np.uint8)
            part.view.read(files, part.row, part.rows, left, width, memoryview(strip))
            values = strip.view(f"u{self.item_bytes}").reshape(part.rows, span)[:, :: self.step]
            for row in range(0, part.rows, _TILE):
                tile = values[row : row + _TILE]
                column = part.column + row * part.step
                result[:, column : column + len(tile) * part.step : part.step] = tile.T


@dataclass(frozen=True, kw_only=True, slots=True)
class Cast:
    """Another operation's elements, cast to another dtype."""

    operation: CopyOperation
    source: Dtype
    target: Dtype

    @property
    def size(self) -> int:
        return self.operation.size // self.source.size * self.target.size

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        data = memoryview(bytearray(self.operation.size))
        self.operation.fill(files, data)
        count = self.values_per_call()
        for first in range(0, len(data) // self.source.size, count):
            stop = first + count
            values = data[first * self.source.size : stop * self.source.size]
            out[first * self.target.size : stop * self.target.size] = self.convert(values)

    def values_per_call(self) -> int:
        """Elements per call of `convert`."""
        return _CAST_AT_ONCE

    def convert(self, values: memoryview) -> memoryview:
        """Convert a run of elements."""
        return cast(values, self.source, self.target)


@dataclass(frozen=True, kw_only=True, slots=True)
class AddConstant(Cast):
    """Another operation's elements plus a constant (-1 to zero-centred gamma, +1 back), cast to another dtype."""

    constant: float
    exact_name: str | None = None  # if given, the sum must be invertible bit for bit; tensor name for the error

    def convert(self, values: memoryview) -> memoryview:
        summed = add(values, self.constant, self.source, self.target)
        if self.exact_name and add(summed, -self.constant, self.target, self.source) != values:
            raise UserError(
                f"{self.exact_name} has values too small for a bit-exact round trip through zero-centred gamma "
                "(Megatron-Core stores the weight minus one); set values below 2e-9 to zero"
            )
        return summed


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizeRows(Cast):
    """Another operation's whole rows, each divided by its L2 norm, cast to another dtype."""

    row: int  # elements per row

    def values_per_call(self) -> int:
        return self.row

    def convert(self, values: memoryview) -> memoryview:
        return normalize_row(values, self.source, self.target)


def cast_operation(operation: CopyOperation, source: Dtype, target: Dtype) -> CopyOperation:
    """`Cast`, or the operation itself if the dtypes are equal."""
    return operation if source is target else Cast(operation=operation, source=source, target=target)


def fill_value(element: bytes, count: int) -> Iterator[CopyOperation]:
    """`count` copies of one element, in operations of at most a block."""
    step = blocks.BLOCK // len(element)
    for start in range(0, count, step):
        yield FillValue(element, min(step, count - start))


def copy_rows(view: ByteView, row: int, rows: int, limit: int | None = None) -> Iterator[CopyRows]:
    """Whole rows in operations of at most `limit` bytes; a longer row is split at multiples of 8 bytes."""
    limit = limit or blocks.BLOCK
    if view.width > limit:
        width = limit // 8 * 8
        for line in range(row, row + rows):
            for left in range(0, view.width, width):
                yield CopyRows(view=view, row=line, rows=1, left=left, width=min(width, view.width - left))
        return
    step = limit // max(view.width, 1)
    for first in range(row, row + rows, step):
        count = min(step, row + rows - first)
        yield CopyRows(view=view, row=first, rows=count, left=0, width=view.width)


def transpose(
    parts: tuple[TransposedRows, ...],
    first: int,
    count: int,
    columns: int,
    item_bytes: int,
    limit: int | None = None,
    step: int = 1,
) -> Iterator[Transpose]:
    """Source columns `first`, `first + step`, ... as `count` rows, in strips of at most `STRIP * limit` bytes.

    Each strip reads every source row once: wider strips, fewer reads.
    """
    most = max(STRIP * (limit or blocks.BLOCK) // (columns * item_bytes * step), 1)
    for done in range(0, count, most):
        yield Transpose(
            parts=parts,
            first=first + done * step,
            count=min(most, count - done),
            columns=columns,
            item_bytes=item_bytes,
            step=step,
        )


def stream(operations: Iterable[CopyOperation], files: OpenFiles) -> Iterator[memoryview]:
    """The operations' bytes in order. A block is valid until the next is requested."""
    buffer = memoryview(bytearray())
    for operation in operations:
        if len(buffer) < operation.size:
            buffer = memoryview(bytearray(operation.size))
        block = buffer[: operation.size]
        operation.fill(files, block)
        yield block


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The unit of writing."""

    size: int
    fill: Callable[[OpenFiles, memoryview], None]  # in any order, concurrently
    finalize: Callable[[memoryview], None] | None = None  # after `fill`, in file order: may depend on earlier blocks
    resumable: bool = True  # whether a run can resume after this block: no running CRC is open


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """Plan of an output file: name, size, sources and blocks."""

    name: str  # relative to the output directory
    size: int  # bytes
    sources: frozenset[Path]  # files its operations read
    make_blocks: Callable[[], Iterator[Block]]


def pack_blocks(operations: Iterable[CopyOperation], limit: int | None = None) -> Iterator[Block]:
    """Operations grouped into blocks of about `limit` bytes; a larger operation is a block of its own."""
    group: list[CopyOperation] = []
    size = 0
    for operation in operations:
        if group and size + operation.size > (limit or blocks.BLOCK):
            yield _block(group, size)
            group, size = [], 0
        group.append(operation)
        size += operation.size
    if group:
        yield _block(group, size)


def _block(operations: list[CopyOperation], size: int) -> Block:
    def fill(files: OpenFiles, out: memoryview) -> None:
        position = 0
        for operation in operations:
            operation.fill(files, out[position : position + operation.size])
            position += operation.size

    return Block(size=size, fill=fill)
