"""Weights as byte views of bf16 values, unquantised or quantised, and copy operations that requantise them.

Quantised weights are dequantised on read, so copy operations see bf16 only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from shared.checkpoint.copy import blocks
from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import ByteView, ExtentView, view_of
from shared.checkpoint.dtypes import BF16, Dtype, to_float32
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.errors import UserError
from shared.mapping.layout import Shape
from shared.quantized import fp8_blocks as fp8
from shared.quantized import int4, mxfp4
from shared.quantized.groups import Component, DequantizedGroups, QuantizeGroups, not_finite
from shared.quantized.scheme import Fp8Blocks, Int4Groups, Mxfp4, QuantizationScheme

if TYPE_CHECKING:
    import numpy as np

_BLOCKS = "_blocks"
_PACKED = "_packed"
_IN_WORD = 8  # 4-bit codes per int32


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight stored as codes and scales."""

    name: str
    codes: TensorInfo
    scales: TensorInfo
    scheme: QuantizationScheme
    stored_shape: TensorInfo | None = None  # int4: the tensor with the weight's shape

    @property
    def shape(self) -> Shape:
        """The dequantised shape."""
        if self.transposed:
            *outer, rows, groups, _ = self.codes.shape
            return (*outer, groups * mxfp4.GROUP, rows)
        if isinstance(self.scheme, Int4Groups):
            return (self.codes.shape[0], self.codes.shape[1] * _IN_WORD)
        return self.codes.shape

    @property
    def transposed(self) -> bool:
        """Whether the codes' rows are columns of the dequantised weight."""
        return isinstance(self.scheme, Mxfp4)

    @property
    def companions(self) -> tuple[TensorInfo, ...]:
        """The tensors stored with the codes: scales, and the shape (int4)."""
        return (self.scales, self.stored_shape) if self.stored_shape else (self.scales,)

    @property
    def components(self) -> dict[str, Component]:
        """Tensor names of codes and scales."""
        return {self.codes.name: "codes", self.scales.name: "scales"}

    @property
    def operation_bytes(self) -> int:
        """Peak memory of one `quantize` operation beyond that of a cast: a row of blocks, fp32 and codes."""
        if isinstance(self.scheme, Mxfp4 | Int4Groups):
            return 0  # no more than a cast
        return min(self.scheme.block[0], self.shape[0]) * self.shape[1] * 5

    def at(self, index: Shape) -> QuantizedWeight:
        """The slice `[index]` of the leading dimensions."""
        return replace(self, codes=sliced(self.codes, index), scales=sliced(self.scales, index))

    def view(self) -> ByteView:
        """The bf16 values, in the row order of the codes."""
        if isinstance(self.scheme, Mxfp4 | Int4Groups):
            codes = view_of(self.codes)
            width = codes.width * 2 * BF16.size  # two codes per byte
            return DequantizedGroups(
                name=self.name, rows=codes.rows, width=width, codes=self.codes, scales=self.scales, scheme=self.scheme
            )
        return DequantizedBlocks(
            name=self.name,
            rows=self.shape[0],
            width=self.shape[1] * BF16.size,
            codes=view_of(self.codes),
            scales=_Scales(tensor=self.scales),
            block=self.scheme.block,
        )


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight of a checkpoint, quantised or not."""

    tensor: TensorInfo  # of the dequantised weight
    quantized: QuantizedWeight | None = None
    joined: ExtentView | None = None  # given: the weight is split over several files

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> Shape:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def place(self) -> str:
        return self.tensor.place

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The stored tensors."""
        return (self.quantized.codes, *self.quantized.companions) if self.quantized else (self.tensor,)

    @property
    def files(self) -> frozenset[Path]:
        parts = self.joined.extents if self.joined else self.stored
        return frozenset(part.file for part in parts)

    def at(self, index: Shape) -> Weight:
        """The slice `[index]` of the leading dimensions."""
        if not index:
            return self
        return replace(self, tensor=sliced(self.tensor, index), quantized=self.quantized and self.quantized.at(index))

    @property
    def transposed(self) -> bool:
        """Whether `view` is the transpose of `shape`."""
        return self.quantized is not None and self.quantized.transposed

    def view(self) -> ByteView:
        """The values' byte view."""
        return self.quantized.view() if self.quantized else self.joined or view_of(self.tensor)


def sliced(tensor: TensorInfo, index: Shape) -> TensorInfo:
    """The slice `tensor[index]` of the leading dimensions."""
    start, size, shape = tensor.start, tensor.size, tensor.shape
    for place in index:
        size //= shape[0]
        start, shape = start + place * size, shape[1:]
    return replace(tensor, start=start, size=size, shape=shape)


def assemble_weights(scheme: QuantizationScheme | None, tensors: Mapping[str, TensorInfo]) -> dict[str, Weight]:
    """Group tensors into weights (codes with their scales), in the order of the tensors.

    Raises:
        UserError: codes without scales, or a scheme other than in config.json.
    """
    found: dict[str, Weight] = {}
    quantized: dict[str, QuantizedWeight] = {}  # by the name of the codes
    for tensor in tensors.values():
        if isinstance(scheme, Mxfp4) and tensor.name.endswith(_BLOCKS):
            quantized[tensor.name] = _mxfp4_weight(scheme, tensor, tensors)
        elif isinstance(scheme, Int4Groups) and tensor.name.endswith(_PACKED):
            quantized[tensor.name] = _int4_weight(scheme, tensor, tensors)
        elif tensor.dtype == "F8_E4M3":
            quantized[tensor.name] = _fp8_weight(scheme, tensor, tensors)
    companions = {tensor.name for weight in quantized.values() for tensor in weight.companions}
    for name, tensor in tensors.items():
        if weight := quantized.get(name):
            size = prod(weight.shape) * BF16.size
            plain = replace(tensor, name=weight.name, dtype=BF16.safetensors, shape=weight.shape, size=size)
            found[weight.name] = Weight(tensor=plain, quantized=weight)
        elif name not in companions:
            found[name] = Weight(tensor=tensor)
    return found


def _mxfp4_weight(scheme: Mxfp4, codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> QuantizedWeight:
    name = codes.name.removesuffix(_BLOCKS)
    scales = tensors.get(f"{name}_scales")
    if codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[-1] != mxfp4.CODES:
        raise UserError(
            f"{codes.place}: {codes.name} is {codes.dtype}{list(codes.shape)}; U8[experts, out, groups, 16] is required"
        )
    if scales is None:
        raise UserError(f"{codes.place}: {name}_scales is missing for {codes.name}; fetch the model again")
    if (scales.dtype, scales.shape) != ("U8", codes.shape[:-1]):
        raise UserError(
            f"{scales.place}: {scales.name} is {scales.dtype}{list(scales.shape)}; {codes.name} requires "
            f"U8{list(codes.shape[:-1])}"
        )
    return QuantizedWeight(name=name, codes=codes, scales=scales, scheme=scheme)


def _int4_weight(scheme: Int4Groups, codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> QuantizedWeight:
    name = codes.name.removesuffix(_PACKED)
    scales, stored_shape = tensors.get(f"{name}_scale"), tensors.get(f"{name}_shape")
    if codes.dtype != "I32" or len(codes.shape) != 2 or codes.shape[1] * _IN_WORD % int4.GROUP:
        raise UserError(
            f"{codes.place}: {codes.name} is {codes.dtype}{list(codes.shape)}; I32[out, in / {_IN_WORD}] is required, "
            f"with in a multiple of {int4.GROUP}"
        )
    if scales is None or stored_shape is None:
        missing = f"{name}_shape" if scales else f"{name}_scale"
        raise UserError(f"{codes.place}: {missing} is missing for {codes.name}; fetch the model again")
    wanted = (codes.shape[0], codes.shape[1] * _IN_WORD // int4.GROUP)
    if (scales.dtype, scales.shape) != ("BF16", wanted):
        raise UserError(
            f"{scales.place}: {scales.name} is {scales.dtype}{list(scales.shape)}; {codes.name} requires BF16{list(wanted)}"
        )
    if stored_shape.dtype not in ("I32", "I64") or stored_shape.shape != (2,):
        raise UserError(
            f"{stored_shape.place}: {stored_shape.name} is {stored_shape.dtype}{list(stored_shape.shape)}; I64[2] is required"
        )
    return QuantizedWeight(name=name, codes=codes, scales=scales, scheme=scheme, stored_shape=stored_shape)


def check_stored_shapes(weights: Mapping[str, Weight], files: OpenFiles) -> None:
    """UserError if a `<name>_shape` tensor disagrees with the shape of the codes."""
    for weight in weights.values():
        if (quantized := weight.quantized) and (declared := quantized.stored_shape):
            data = files.read(declared.file, declared.start, declared.size)
            found = struct.unpack("<2i" if declared.dtype == "I32" else "<2q", data)
            if found != quantized.shape:
                raise UserError(
                    f"{declared.place}: {declared.name} is {list(found)}, but {quantized.codes.name} holds a "
                    f"{list(quantized.shape)} weight; fetch the model again"
                )


def _fp8_weight(
    scheme: QuantizationScheme | None, codes: TensorInfo, tensors: Mapping[str, TensorInfo]
) -> QuantizedWeight:
    if not isinstance(scheme, Fp8Blocks):
        raise UserError(
            f"{codes.place}: {codes.name} is {codes.dtype}, but config.json has no quantization_config "
            "with quant_method fp8; fetch config.json again"
        )
    if len(codes.shape) != 2:
        raise UserError(
            f"{codes.place}: {codes.name} is {codes.dtype}{list(codes.shape)}; a matrix is required: save experts one by one, as "
            "save_pretrained does by default"
        )
    name = f"{codes.name}_scale_inv"
    scales = tensors.get(name)
    if scales is None:
        raise UserError(f"{codes.place}: {codes.name} is {codes.dtype}, and {name} is missing; fetch the model again")
    if scales.dtype not in fp8.SCALE_TYPES:
        known = " or ".join(fp8.SCALE_TYPES)
        raise UserError(f"{scales.place}: {name} is {scales.dtype}; {known} is required")
    wanted = tuple(-(-size // block) for size, block in zip(codes.shape, scheme.block, strict=True))
    if scales.shape != wanted:
        raise UserError(
            f"{scales.place}: {name} is {list(scales.shape)}; {codes.name}, {list(codes.shape)} in blocks of "
            f"{list(scheme.block)}, requires {list(wanted)}"
        )
    return QuantizedWeight(name=codes.name, codes=codes, scales=scales, scheme=scheme)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scales:
    """Block scales, `[block rows, block columns]`."""

    tensor: TensorInfo

    def row(self, files: OpenFiles, row: int) -> np.ndarray:
        """One row as float32; UserError for NaN, which cannot be requantised."""
        import numpy as np

        view = view_of(self.tensor)
        data = memoryview(bytearray(view.width))
        view.read(files, row, 1, 0, view.width, data)
        scales = fp8.read_scales(data, self.tensor.dtype)
        if np.isnan(scales).any():
            raise UserError(f"{self.tensor.place}: {self.tensor.name} holds NaN in row {row}; fetch the model again")
        return scales


@dataclass(frozen=True, kw_only=True, slots=True)
class DequantizedBlocks:
    """Byte view of the bf16 values of FP8 blocks, dequantised on read."""

    name: str
    rows: int
    width: int
    codes: ExtentView
    scales: _Scales
    block: tuple[int, int]

    def read(self, files: OpenFiles, row: int, rows: int, left: int, width: int, out: memoryview) -> None:
        """As `ByteView.read`."""
        import numpy as np

        first, columns = left // BF16.size, width // BF16.size
        codes = np.empty((rows, columns), dtype=np.uint8)
        self.codes.read(files, row, rows, first, columns, memoryview(codes).cast("B"))
        result = np.frombuffer(out, dtype=np.uint16).reshape(rows, columns)
        high, wide = self.block
        for band in range(row // high, -(-(row + rows) // high)):
            top, bottom = max(band * high - row, 0), min((band + 1) * high - row, rows)
            start, stop = first // wide, -(-(first + columns) // wide)
            scales = self.scales.row(files, band)[start:stop]
            for number, products in enumerate(fp8.product_table(scales), start):
                at = slice(max(number * wide - first, 0), (number + 1) * wide - first)
                result[top:bottom, at] = products[codes[top:bottom, at]]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeBlocks:
    """Copy operation: one row of blocks requantised, one component (codes or scales) of the result."""

    values: ByteView
    dtype: Dtype
    quantized: QuantizedWeight  # the original, whose scales are kept where unchanged
    component: Component
    band: int

    @property
    def size(self) -> int:
        if self.component == "codes":
            return self._rows * self.quantized.shape[1]
        return self.quantized.scales.row_bytes

    @property
    def _rows(self) -> int:
        high, _ = self._block
        return min(high, self.quantized.shape[0] - self.band * high)

    @property
    def _block(self) -> tuple[int, int]:
        assert isinstance(self.quantized.scheme, Fp8Blocks)
        return self.quantized.scheme.block

    def fill(self, files: OpenFiles, out: memoryview) -> None:
        import numpy as np

        quantized, (high, wide) = self.quantized, self._block
        assert isinstance(quantized.scheme, Fp8Blocks)
        even = quantized.scheme.powers_of_two or quantized.scales.dtype == fp8.E8M0
        old = _Scales(tensor=quantized.scales).row(files, self.band)
        new, rows, columns = np.empty_like(old), self._rows, quantized.shape[1]
        data = np.empty((rows, columns * self.dtype.size), dtype=np.uint8)
        self.values.read(files, self.band * high, rows, 0, self.values.width, memoryview(data).cast("B"))
        codes = np.frombuffer(out, dtype=np.uint8).reshape(rows, columns) if self.component == "codes" else None
        for number, scale in enumerate(old):
            at = slice(number * wide, min((number + 1) * wide, columns))
            block = np.ascontiguousarray(data[:, at.start * self.dtype.size : at.stop * self.dtype.size])
            values = to_float32(memoryview(block).cast("B"), self.dtype).reshape(rows, -1)
            try:
                made, new[number] = fp8.requantize(values, scale, powers_of_two=even)
            except fp8.NotFiniteError:
                raise not_finite(quantized.name) from None
            if codes is not None:
                codes[:, at] = made
        if self.component == "scales":
            out[:] = fp8.write_scales(new, quantized.scales.dtype)


def quantize(
    values: ByteView, dtype: Dtype, quantized: QuantizedWeight, component: Component
) -> Iterator[QuantizeBlocks | QuantizeGroups]:
    """Copy operations that quantise a view of values of type `dtype`, one component of the result."""
    if isinstance(quantized.scheme, Mxfp4 | Int4Groups):
        step = max(blocks.BLOCK // values.width, 1)
        for row in range(0, values.rows, step):
            rows = min(step, values.rows - row)
            yield QuantizeGroups(
                values=values,
                dtype=dtype,
                scales=quantized.scales,
                scheme=quantized.scheme,
                component=component,
                row=row,
                rows=rows,
            )
        return
    for band in range(-(-quantized.shape[0] // quantized.scheme.block[0])):
        yield QuantizeBlocks(values=values, dtype=dtype, quantized=quantized, component=component, band=band)
