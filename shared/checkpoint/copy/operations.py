"""What a new file's bytes are made of: moves, each of bounded size, each made on its own and in any order.

A file is a sequence of moves. `windows` cuts rows of a tensor into moves of at most a block, so that memory does not
grow with the tensor, and `blocks` packs moves into the blocks that a file is written in.
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

STRIP = 8  # blocks that a strip of a transposed tensor may take
_TILE = 64  # rows that are transposed at once, so that both sides stay in a core's cache
_CAST_AT_ONCE = 1 << 18  # numbers; a conversion holds several copies of them


class CopyOperation(Protocol):
    """Makes `size` bytes of a file."""

    @property
    def size(self) -> int: ...

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        """Write the bytes into `out`, which is of that size."""
        ...


@dataclass(frozen=True, slots=True)
class WriteBytes:
    """Bytes known beforehand."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        out[:] = self.data


@dataclass(frozen=True, slots=True)
class FillValue:
    """One number again and again."""

    number: bytes
    count: int

    @property
    def size(self) -> int:
        return self.count * len(self.number)

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        out[:] = self.number * self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyRows:
    """Rows and columns of a tensor as they are."""

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
    """`rows` rows of a tensor that become as many columns, from column `at` on, `step` apart."""

    view: ByteView
    row: int
    rows: int
    column: int
    step: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Transpose:
    """A strip of tensors transposed: `count` columns of the parts, `step` apart from `first` on, become rows."""

    parts: tuple[TransposedRows, ...]
    first: int
    count: int
    columns: int  # of the result
    item: int  # bytes of a number
    step: int = 1

    @property
    def size(self) -> int:
        return self.count * self.columns * self.item

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        import numpy as np  # the only move, but for a change of type, that needs it

        result = np.frombuffer(out, dtype=f"u{self.item}").reshape(self.count, self.columns)
        span = (self.count - 1) * self.step + 1
        left, width = self.first * self.item, span * self.item
        for part in self.parts:
            strip = np.empty(part.rows * width, dtype=np.uint8)
            part.view.read(files, part.row, part.rows, left, width, memoryview(strip))
            numbers = strip.view(f"u{self.item}").reshape(part.rows, span)[:, :: self.step]
            for row in range(0, part.rows, _TILE):
                tile = numbers[row : row + _TILE]
                column = part.column + row * part.step
                result[:, column : column + len(tile) * part.step : part.step] = tile.T


@dataclass(frozen=True, kw_only=True, slots=True)
class Cast:
    """Another move's numbers in another type."""

    operation: CopyOperation
    source: Dtype
    target: Dtype

    @property
    def size(self) -> int:
        return self.operation.size // self.source.size * self.target.size

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        held = memoryview(bytearray(self.operation.size))
        self.operation.fill(files, held)
        count = self.values_per_call()
        for first in range(0, len(held) // self.source.size, count):
            stop = first + count
            numbers = held[first * self.source.size : stop * self.source.size]
            out[first * self.target.size : stop * self.target.size] = self.convert(numbers)

    def values_per_call(self) -> int:
        """How many numbers `changed` is given."""
        return _CAST_AT_ONCE

    def convert(self, numbers: memoryview) -> memoryview:
        """What becomes of some of them."""
        return cast(numbers, self.source, self.target)


@dataclass(frozen=True, kw_only=True, slots=True)
class AddConstant(Cast):
    """Another move's numbers plus one or less one, in another type."""

    number: float
    exact_name: str | None = None  # the tensor that must come back bit for bit, to be named where it does not

    def convert(self, numbers: memoryview) -> memoryview:
        summed = add(numbers, self.number, self.source, self.target)
        if self.exact_name and add(summed, -self.number, self.target, self.source) != numbers:
            raise UserError(
                f"{self.exact_name} has numbers too small to be held as Megatron-Core does, less one, and given back "
                "bit for bit; set those below 2e-9 to zero"
            )
        return summed


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizeRows(Cast):
    """Another move's rows, whole ones, each divided by its length, in another type."""

    row: int  # numbers of one

    def values_per_call(self) -> int:
        return self.row

    def convert(self, numbers: memoryview) -> memoryview:
        return normalize_row(numbers, self.source, self.target)


def cast_operation(operation: CopyOperation, source: Dtype, target: Dtype) -> CopyOperation:
    """The move itself where the types are the same."""
    return operation if source is target else Cast(operation=operation, source=source, target=target)


def fill_value(number: bytes, count: int) -> Iterator[CopyOperation]:
    """One number so many times, in moves of at most a block."""
    step = blocks.BLOCK // len(number)
    for start in range(0, count, step):
        yield FillValue(number, min(step, count - start))


def copy_rows(view: ByteView, row: int, rows: int, limit: int | None = None) -> Iterator[CopyRows]:
    """Whole rows in moves of at most `limit` bytes; a longer row is cut, at a multiple of 8 bytes."""
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
    item: int,
    limit: int | None = None,
    step: int = 1,
) -> Iterator[Transpose]:
    """`count` columns of the parts, `step` apart from `first` on, as rows: in strips that read at most 8 `limit` bytes.

    A strip is read in as many pieces as its parts have rows: the wider it is, the fewer.
    """
    most = max(STRIP * (limit or blocks.BLOCK) // (columns * item * step), 1)
    for done in range(0, count, most):
        yield Transpose(
            parts=parts,
            first=first + done * step,
            count=min(most, count - done),
            columns=columns,
            item=item,
            step=step,
        )


def stream(operations: Iterable[CopyOperation], files: OpenFiles) -> Iterator[memoryview]:
    """The moves' bytes one after the other; each block is valid until the next one is asked for."""
    buffer = memoryview(bytearray())
    for operation in operations:
        if len(buffer) < operation.size:
            buffer = memoryview(bytearray(operation.size))
        block = buffer[: operation.size]
        operation.fill(files, block)
        yield block


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """What is written to a file at once."""

    size: int
    fill: Callable[[OpenFiles, memoryview], None]  # in any order, several at a time
    finalize: Callable[[memoryview], None] | None = None  # after it, in the file's order: what depends on bytes before
    resumable: bool = True  # whether what follows can be written without knowing what came before


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """A file to be."""

    name: str  # relative to the directory it is written to
    size: int  # bytes
    sources: frozenset[Path]  # the files it is made of
    make_blocks: Callable[[], Iterator[Block]]


def pack_blocks(operations: Iterable[CopyOperation], limit: int | None = None) -> Iterator[Block]:
    """Moves in blocks of about `limit` bytes: neighbours are written at once, a larger move alone."""
    held: list[CopyOperation] = []
    size = 0
    for operation in operations:
        if held and size + operation.size > (limit or blocks.BLOCK):
            yield _block(held, size)
            held, size = [], 0
        held.append(operation)
        size += operation.size
    if held:
        yield _block(held, size)


def _block(operations: list[CopyOperation], size: int) -> Block:
    def fill(files: OpenFiles, out: memoryview) -> None:
        position = 0
        for operation in operations:
            operation.fill(files, out[position : position + operation.size])
            position += operation.size

    return Block(size=size, fill=fill)
