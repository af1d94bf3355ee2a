"""`W + scale * B @ A` strip by strip in fp32, with PEFT's order of operations and rounding."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from shared.checkpoint.copy import blocks
from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import ExtentView, view_of
from shared.checkpoint.copy.operations import CopyOperation
from shared.checkpoint.dtypes import Dtype, cast, count_not_finite, from_float32, to_float32, weight_dtype
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.errors import UserError

if TYPE_CHECKING:
    import numpy as np


class _Cached(threading.local):
    """The thread's last factor: the next strip is usually of the same matrix."""

    key: object = None
    values: np.ndarray


_cached = _Cached()


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """The weight W."""

    view: ExtentView
    stored: Dtype
    dtype: Dtype  # of the result; W is cast to it before the addition

    @property
    def columns(self) -> int:
        return self.view.width // self.stored.size

    def rows(self, files: OpenFiles, first: int, count: int) -> np.ndarray:
        """Rows as writable fp32 `[count, columns]`."""
        data = memoryview(bytearray(count * self.view.width))
        self.view.read(files, first, count, 0, self.view.width, data)
        return to_float32(cast(data, self.stored, self.dtype), self.dtype).reshape(count, self.columns)

    def strips(self) -> Iterator[tuple[int, int]]:
        """Strips of a block of fp32: first row, number of rows."""
        step = max(blocks.BLOCK // (4 * self.columns), 1)
        for first in range(0, self.view.rows, step):
            yield first, min(step, self.view.rows - first)


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """Rows of `scale * B @ A`, with `A [rank, in]` and `B [out, rank]`.

    Experts share A and B: `A [experts * rank, in]`, `B [out, rank * experts]`. Expert e has rows `e * rank` to
    `(e + 1) * rank` of A and columns `e, e + experts, ...` of B.
    """

    a: TensorInfo
    b: TensorInfo
    rank: int
    scale: float
    transposed: bool  # W is `[in, out]` (Conv1D, experts of PEFT before 0.19) or an embedding `[tokens, hidden]`
    downcast_first: bool = False  # scale * B @ A is cast to the dtype of W before the addition
    magnitude: TensorInfo | None = None  # DoRA: a norm per output
    expert: int = 0
    experts: int = 1
    first_row: int = 0  # first row of W in B @ A: gate and up may share A and B
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _factors: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def bytes_held(self) -> int:
        """Bytes of the cached factor and of the temporaries that build it."""
        return 3 * 4 * prod((self.b if self.transposed else self.a).shape) // self.experts

    def rows(self, files: OpenFiles, first: int, count: int, columns: int) -> np.ndarray:
        """Rows `first` to `first + count` of `scale * B @ A`: `[count, columns]`."""
        import numpy as np

        first += self.first_row
        if self.transposed:
            left = self._a(files, first, count).T
            right = self._factor(files, (self, "b"), 0, columns).T
        else:
            left = self._b(files, first, count)
            right = self._factor(files, (self, "a"), 0, columns)
        result = left @ right
        result *= np.float32(self.scale)
        return result

    def _factor(self, files: OpenFiles, key: tuple[Delta, str], first: int, count: int) -> np.ndarray:
        if _cached.key != key:
            _cached.values = self._b(files, first, count) if self.transposed else self._a(files, first, count)
            _cached.key = key
        return _cached.values

    def _a(self, files: OpenFiles, first: int, count: int) -> np.ndarray:
        """Columns of the expert's `A`: `[rank, count]`."""
        return _window(self.a, files, self.expert * self.rank, self.rank, first, count)

    def _b(self, files: OpenFiles, first: int, count: int) -> np.ndarray:
        """Rows of the expert's `B`: `[count, rank]`."""
        rows = _window(self.b, files, first, count, 0, self.b.shape[1])
        return rows[:, self.expert :: self.experts]

    def magnitudes(self, files: OpenFiles) -> np.ndarray:
        """DoRA's magnitude vector `[outputs]`."""
        assert self.magnitude is not None
        count = self.magnitude.shape[0]
        return _window(self.magnitude, files, 0, count, 0, 1).reshape(count)

    def column_factors(self, files: OpenFiles, base: Matrix) -> np.ndarray:
        """DoRA's factor per column of W `[in, out]`; the column norms need one pass over all rows."""
        import numpy as np

        with self._lock:
            if not self._factors:
                squares = np.zeros(base.columns, dtype=np.float64)
                for first, count in base.strips():
                    strip = base.rows(files, first, count)
                    strip += self.rows(files, first, count, base.columns)
                    squares += np.einsum("ij,ij->j", strip, strip, dtype=np.float64)
                self._factors.append(self.magnitudes(files) / np.sqrt(squares).astype(np.float32))
            return self._factors[0]


def _window(tensor: TensorInfo, files: OpenFiles, row: int, rows: int, left: int, columns: int) -> np.ndarray:
    """A block of an adapter tensor in fp32: `[rows, columns]`."""
    dtype = weight_dtype(tensor.dtype, tensor.name, tensor.place)
    data = memoryview(bytearray(rows * columns * dtype.size))
    view_of(tensor).read(files, row, rows, left * dtype.size, columns * dtype.size, data)
    return to_float32(data, dtype).reshape(rows, columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """Rows of `W + scale * B @ A`."""

    base: Matrix
    delta: Delta
    first: int
    count: int

    @property
    def size(self) -> int:
        return self.count * self.base.columns * self.base.dtype.size

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        import numpy as np

        delta, base, dtype = self.delta, self.base, self.base.dtype
        values = base.rows(files, self.first, self.count)
        added = delta.rows(files, self.first, self.count, base.columns)
        if delta.downcast_first:
            added = to_float32(from_float32(added.reshape(-1), dtype), dtype).reshape(added.shape)
        values += added
        if delta.magnitude is not None:
            if delta.transposed:
                values *= delta.column_factors(files, base)
            else:
                norms = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64)).astype(np.float32)
                mine = slice(self.first, self.first + self.count)
                values *= (delta.magnitudes(files)[mine] / norms)[:, None]
        out[:] = from_float32(values.reshape(-1), dtype)
        if any(count_not_finite(out, dtype)):
            raise UserError(
                f"{delta.b.place}: {base.view.name} is not finite in {dtype.name} after merging: the adapter is "
                "broken, or the base's dtype too narrow"
            )


def merged(base: Matrix, delta: Delta) -> Iterator[CopyOperation]:
    """Copy operations of `W + scale * B @ A`."""
    for first, count in base.strips():
        yield Merged(base=base, delta=delta, first=first, count=count)
