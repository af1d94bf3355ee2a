"""Weights quantised in groups of 32 (MXFP4, int4): dequantised on read, requantised on write.

Shapes: a weight is `[rows, groups * 32]`; codes `[rows, groups, 16]` bytes, scales `[rows, groups]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import ByteView, view_of
from shared.checkpoint.dtypes import BF16, Dtype, to_float32
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.errors import UserError
from shared.quantized import int4, mxfp4
from shared.quantized.fp8_blocks import NotFiniteError
from shared.quantized.scheme import Int4Groups, Mxfp4

if TYPE_CHECKING:
    import numpy as np

Component = Literal["codes", "scales"]
_AT_ONCE = 1 << 13  # groups per call of a codec, which holds several copies


def codec_of(scheme: Mxfp4 | Int4Groups) -> ModuleType:
    """The codec of a scheme: `decode`, `requantize`, `GROUP`, `CODES`, `SCALE`."""
    return mxfp4 if isinstance(scheme, Mxfp4) else int4


def _scales(
    files: OpenFiles, tensor: TensorInfo, size: int, row: int, rows: int, first: int, groups: int
) -> np.ndarray:
    import numpy as np

    found = np.empty(rows * groups, dtype={1: np.uint8, 2: np.uint16}[size])
    view_of(tensor).read(files, row, rows, first * size, groups * size, memoryview(found).cast("B"))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class DequantizedGroups:
    """Byte view of the bf16 values, dequantised on read."""

    name: str
    rows: int
    width: int
    codes: TensorInfo
    scales: TensorInfo
    scheme: Mxfp4 | Int4Groups

    def read(self, files: OpenFiles, row: int, rows: int, left: int, width: int, out: memoryview) -> None:
        """As `ByteView.read`. UserError if a scale is NaN or infinity, which cannot be requantised."""
        import numpy as np

        codec = codec_of(self.scheme)
        group_bytes = codec.GROUP * BF16.size
        first, last = left // group_bytes, -(-(left + width) // group_bytes)
        groups = last - first
        codes = np.empty((rows * groups, codec.CODES), dtype=np.uint8)
        at, wide = first * codec.CODES, groups * codec.CODES
        view_of(self.codes).read(files, row, rows, at, wide, memoryview(codes).cast("B"))
        scales = _scales(files, self.scales, codec.SCALE, row, rows, first, groups)
        unaligned = (first * group_bytes, groups * group_bytes) != (left, width)
        decoded = (
            np.empty((len(codes), codec.GROUP), dtype=np.uint16) if unaligned else np.frombuffer(out, dtype=np.uint16)
        )
        decoded = decoded.reshape(-1, codec.GROUP)
        for start in range(0, len(codes), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            try:
                decoded[part] = codec.decode(codes[part], scales[part])
            except NotFiniteError:
                place = f"{self.scales.place}: {self.scales.name}"
                raise UserError(f"{place} holds NaN or infinity; fetch the model again") from None
        if unaligned:
            begin = (left - first * group_bytes) // BF16.size
            values = np.frombuffer(out, dtype=np.uint16).reshape(rows, -1)
            values[:] = decoded.reshape(rows, -1)[:, begin : begin + values.shape[1]]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeGroups:
    """Copy operation: rows of a view requantised, one component (codes or scales) of the result."""

    values: ByteView
    dtype: Dtype
    scales: TensorInfo  # the old ones
    scheme: Mxfp4 | Int4Groups
    component: Component
    row: int
    rows: int

    @property
    def groups(self) -> int:
        """Groups per row."""
        return self.scales.row_bytes // codec_of(self.scheme).SCALE

    @property
    def size(self) -> int:
        codec = codec_of(self.scheme)
        return self.rows * self.groups * int(codec.CODES if self.component == "codes" else codec.SCALE)

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        import numpy as np

        codec = codec_of(self.scheme)
        data = memoryview(bytearray(self.rows * self.values.width))
        self.values.read(files, self.row, self.rows, 0, self.values.width, data)
        old = _scales(files, self.scales, codec.SCALE, self.row, self.rows, 0, self.groups)
        result = np.frombuffer(out, dtype=np.uint8 if self.component == "codes" else old.dtype).reshape(len(old), -1)
        step = codec.GROUP * self.dtype.size
        for start in range(0, len(old), _AT_ONCE):
            stop = min(start + _AT_ONCE, len(old))
            values = to_float32(data[start * step : stop * step], self.dtype).reshape(-1, codec.GROUP)
            try:
                codes, scales = codec.requantize(values, old[start:stop])
            except NotFiniteError:
                raise not_finite(self.values.name) from None
            result[start:stop] = codes if self.component == "codes" else scales[:, None]


def not_finite(name: str) -> UserError:
    """The error of a weight with new NaN or infinity."""
    return UserError(
        f"{name} has NaN or infinity that the original lacks and cannot be quantised; continue from a checkpoint without "
        "them, or convert without --quantized"
    )
