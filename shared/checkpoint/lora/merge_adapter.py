"""`W + scale * B @ A` strip by strip: the exact numbers, rounded once to the dtype of W.

Computed in float64. The order of its additions is the BLAS library's, and depends on the processor. Where that could decide the
rounding, the number is computed again in rational arithmetic, so every processor writes the same bits. Not so with DoRA, whose
norms are sums over rows: two processors may differ by one ulp where a number is next to a tie.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import nextafter, prod
from typing import TYPE_CHECKING

from shared.checkpoint.copy import blocks
from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import ExtentView, view_of
from shared.checkpoint.copy.operations import CopyOperation
from shared.checkpoint.dtypes import (
    FP32,
    Dtype,
    cast,
    count_not_finite,
    from_float32,
    from_float64,
    to_float64,
    weight_dtype,
)
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.errors import UserError
from shared.quantized.stored_weight import sliced

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
        """Rows in float64 `[count, columns]`."""
        data = memoryview(bytearray(count * self.view.width))
        self.view.read(files, first, count, 0, self.view.width, data)
        return to_float64(cast(data, self.stored, self.dtype), self.dtype).reshape(count, self.columns)

    def strips(self) -> Iterator[tuple[int, int]]:
        """Strips of a quarter of a block of float64: first row, number of rows."""
        step = max(blocks.BLOCK // (32 * self.columns), 1)
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
    transposed: (
        bool  # W is `[in, out]` (Conv1D, gpt-oss, experts of PEFT before 0.19) or an embedding `[tokens, hidden]`
    )
    magnitude: TensorInfo | None = None  # DoRA: a norm per output
    expert: int = 0
    experts: int = 1
    first_row: int = 0  # first row of W in B @ A: gate and up may share A and B
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _factors: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def bytes_held(self) -> int:
        """Bytes of the cached factor and of the temporaries that build it."""
        return 3 * 8 * prod((self.b if self.transposed else self.a).shape) // self.experts

    def factors(self, files: OpenFiles, first: int, count: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        """`[count, rank]` and `[rank, columns]`, whose product times `scale` is rows `first` to `first + count`."""
        first += self.first_row
        if self.transposed:
            return self._a(files, first, count).T, self._factor(files, (self, "b"), 0, columns).T
        return self._b(files, first, count), self._factor(files, (self, "a"), 0, columns)

    def rows(self, files: OpenFiles, first: int, count: int, columns: int) -> np.ndarray:
        """Rows `first` to `first + count` of `scale * B @ A`: `[count, columns]`."""
        left, right = self.factors(files, first, count, columns)
        result: np.ndarray = left @ right
        result *= self.scale
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
                    squares += np.einsum("ij,ij->j", strip, strip)
                self._factors.append(self.magnitudes(files) / np.sqrt(squares))
            return self._factors[0]


def _window(tensor: TensorInfo, files: OpenFiles, row: int, rows: int, left: int, columns: int) -> np.ndarray:
    """A block of an adapter tensor in float64: `[rows, columns]`."""
    dtype = weight_dtype(tensor.dtype, tensor.name, tensor.place)
    data = memoryview(bytearray(rows * columns * dtype.size))
    view_of(tensor).read(files, row, rows, left * dtype.size, columns * dtype.size, data)
    return to_float64(data, dtype).reshape(rows, columns)


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
        delta, dtype = self.delta, self.base.dtype
        out[:] = self._scaled(files) if delta.magnitude else self._exact(files)
        if any(count_not_finite(out, dtype)):
            raise UserError(
                f"{delta.b.place}: {self.base.view.name} is not finite in {dtype.name} after merging: the adapter is "
                "broken, or the base's dtype too narrow"
            )

    def _exact(self, files: OpenFiles) -> memoryview:
        """The rows, correctly rounded: where both ends of an interval around the exact number round alike, so does that."""
        import numpy as np

        dtype, scale = self.base.dtype, self.delta.scale
        base = self.base.rows(files, self.first, self.count)
        left, right = self.delta.factors(files, self.first, self.count, self.base.columns)
        with np.errstate(invalid="ignore", over="ignore"):  # of a broken adapter: `fill` refuses the result
            values = left @ right
            values *= scale
            values += base
            # Products of two numbers of 24 bits are exact in float64. Each of the rank additions, the scaling and the addition of
            # W err by 2^-53 of the number so far, which the sum of all magnitudes bounds.
            error = np.abs(left).max(1)[:, None] * (abs(scale) * np.abs(right).sum(0))
            error += np.abs(base)
            error *= (self.delta.rank + 4) * 2.0**-53
            # To 16 bits through float32, which is fast: a second rounding, within this wider interval.
            wide = error if dtype is FP32 else np.abs(values) * 2.0**-23 + (2 * error + 2.0**-149)
            found, high = (_bits((values + x).astype(np.float32), dtype) for x in (-wide, wide))
            unsure = np.flatnonzero(found != high)
            near, error = values.reshape(-1)[unsure] + 0.0, error.reshape(-1)[unsure]  # no negative zeros
            found[unsure], high = (_bits(near + x, dtype) for x in (-error, error))
            if np.isfinite(near).all():
                for place in unsure[found[unsure] != high]:
                    row, column = divmod(int(place), self.base.columns)
                    products = (Fraction(b) * Fraction(a) for b, a in zip(left[row], right[:, column], strict=True))
                    exact = _to_odd(Fraction(base[row, column]) + Fraction(scale) * sum(products))
                    found[place] = _bits(np.array([exact]), dtype)[0]
        return memoryview(found).cast("B")

    def _scaled(self, files: OpenFiles) -> memoryview:
        """The rows of DoRA: each output of `W + scale * B @ A` scaled to its magnitude."""
        import numpy as np

        delta, base = self.delta, self.base
        values = base.rows(files, self.first, self.count)
        values += delta.rows(files, self.first, self.count, base.columns)
        if delta.transposed:
            values *= delta.column_factors(files, base)
        else:
            norms = np.sqrt(np.einsum("ij,ij->i", values, values))
            mine = slice(self.first, self.first + self.count)
            values *= (delta.magnitudes(files)[mine] / norms)[:, None]
        return from_float64(values.reshape(-1), base.dtype)


def _bits(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Flat bit patterns of float32 or float64 values rounded to a dtype."""
    import numpy as np

    rounded = from_float32 if values.dtype == np.float32 else from_float64
    return np.frombuffer(rounded(values.reshape(-1), dtype), f"u{dtype.size}")


def _to_odd(exact: Fraction) -> float:
    """Rounded to float64, to odd: rounding that to a narrower dtype rounds the exact number (see `from_float64`)."""
    nearest = float(exact)
    if Fraction(nearest) == exact or int(nearest.hex().partition("p")[0][-1], 16) % 2:
        return nearest
    return nextafter(nearest, float("inf") if exact > nearest else float("-inf"))


def merged_tensor(whole: TensorInfo, dtype: Dtype, deltas: Sequence[Delta]) -> Iterator[CopyOperation]:
    """Copy operations of a weight with its deltas: one, or one for each expert of a stack.

    Args:
        whole: W, `[rows, columns]` or `[experts, rows, columns]`.
        dtype: of the result.
        deltas: of W.
    """
    held = weight_dtype(whole.dtype, whole.name, whole.place)
    for number, delta in enumerate(deltas):
        part = sliced(whole, (number,)) if len(whole.shape) > 2 else whole
        yield from merged(Matrix(view=view_of(part), stored=held, dtype=dtype), delta)


def merged(base: Matrix, delta: Delta) -> Iterator[CopyOperation]:
    """Copy operations of `W + scale * B @ A`."""
    for first, count in base.strips():
        yield Merged(base=base, delta=delta, first=first, count=count)
