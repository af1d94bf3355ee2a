"""Weights as plain numbers, whether they are stored so or as codes and scales, and the way back into codes.

Numbers are made of codes when they are read, a window at a time, so that whoever moves a tensor's rows or columns need
not know how it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

from shared.checkpoint import fp8
from shared.checkpoint.blocks import Files
from shared.checkpoint.dtypes import BF16, BY_SAFETENSORS, Dtype, from_float32, to_float32
from shared.checkpoint.region import Matrix, Region, region_of
from shared.checkpoint.safetensors_file import TensorInfo
from shared.errors import UserError
from shared.mapping.layout import Shape
from shared.mapping.quantization import Quantization

Half = Literal["codes", "scales"]
_SCALE_TYPES = ("F32", "BF16")


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight that is stored as codes and scales."""

    name: str
    codes: TensorInfo
    scales: TensorInfo
    form: Quantization

    @property
    def shape(self) -> Shape:
        return self.codes.shape

    @property
    def halves(self) -> dict[str, Half]:
        """Names of the two tensors."""
        return {self.codes.name: "codes", self.scales.name: "scales"}

    @property
    def strip_bytes(self) -> int:
        """Bytes that making its codes takes at most: a band of blocks, in fp32, and its codes."""
        return min(self.form.block[0], self.shape[0]) * self.shape[1] * 5

    def matrix(self) -> Matrix:
        """The numbers in bf16."""
        return _Decoded(
            name=self.name,
            rows=self.shape[0],
            width=self.shape[1] * BF16.size,
            codes=region_of(self.codes),
            scales=_Scales(region=region_of(self.scales), dtype=BY_SAFETENSORS[self.scales.dtype]),
            block=self.form.block,
        )


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of plain numbers, as a checkpoint has it."""

    tensor: TensorInfo  # as if they were stored so
    packed: Packed | None = None

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
        """The tensors that hold it."""
        return (self.packed.codes, self.packed.scales) if self.packed else (self.tensor,)

    @property
    def files(self) -> frozenset[Path]:
        return frozenset(tensor.file for tensor in self.stored)

    def at(self, index: Shape) -> Weight:
        """The slice at a place on its first axes."""
        assert not index or self.packed is None, self.name
        return replace(self, tensor=sliced(self.tensor, index)) if index else self

    def matrix(self) -> Matrix:
        """Its rows."""
        return self.packed.matrix() if self.packed else region_of(self.tensor)


def sliced(tensor: TensorInfo, index: Shape) -> TensorInfo:
    """The slice of a tensor at a place on its first axes."""
    start, size, shape = tensor.start, tensor.size, tensor.shape
    for place in index:
        size //= shape[0]
        start, shape = start + place * size, shape[1:]
    return replace(tensor, start=start, size=size, shape=shape)


def weights_of(form: Quantization | None, tensors: Mapping[str, TensorInfo]) -> dict[str, Weight]:
    """The weights that tensors of a checkpoint are, in their order; scales are a part of what they scale.

    Raises:
        UserError: codes without the scales they need, or that no configuration speaks of.
    """
    found: dict[str, Weight] = {}
    packed: dict[str, Packed] = {}
    for tensor in tensors.values():
        if tensor.dtype == "F8_E4M3":
            packed[tensor.name] = _packed(form, tensor, tensors)
    scales = {weight.scales.name for weight in packed.values()}
    for name, tensor in tensors.items():
        if name in packed:
            plain = replace(tensor, dtype=BF16.safetensors, size=prod(tensor.shape) * BF16.size)
            found[name] = Weight(tensor=plain, packed=packed[name])
        elif name not in scales:
            found[name] = Weight(tensor=tensor)
    return found


def _packed(form: Quantization | None, codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Packed:
    if form is None:
        raise UserError(
            f"{codes.place}: {codes.name} is {codes.dtype}, but config.json has no quantization_config that says how "
            "to read it; fetch config.json again"
        )
    if len(codes.shape) != 2:
        raise UserError(
            f"{codes.place}: {codes.name} is {codes.dtype}{list(codes.shape)}; codes of a matrix are wanted"
        )
    name = f"{codes.name}_scale_inv"
    scales = tensors.get(name)
    if scales is None:
        raise UserError(f"{codes.place}: {codes.name} is {codes.dtype}, and {name} is missing; fetch the model again")
    if scales.dtype not in _SCALE_TYPES:
        raise UserError(f"{scales.place}: {name} is {scales.dtype}; scales of {' or '.join(_SCALE_TYPES)} are wanted")
    wanted = tuple(-(-size // block) for size, block in zip(codes.shape, form.block, strict=True))
    if scales.shape != wanted:
        raise UserError(
            f"{scales.place}: {name} is {list(scales.shape)}; {codes.name}, {list(codes.shape)} in blocks of "
            f"{list(form.block)}, asks for {list(wanted)}"
        )
    return Packed(name=codes.name, codes=codes, scales=scales, form=form)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scales:
    """A matrix of scales."""

    region: Region
    dtype: Dtype

    def row(self, files: Files, row: int) -> memoryview:
        """One row as float32."""
        data = memoryview(bytearray(self.region.width))
        self.region.read(files, row, 1, 0, self.region.width, data)
        return memoryview(to_float32(data, self.dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Decoded:
    """bf16 numbers, made of codes and scales when they are read."""

    name: str
    rows: int
    width: int
    codes: Region
    scales: _Scales
    block: tuple[int, int]

    def read(self, files: Files, row: int, rows: int, left: int, width: int, out: memoryview) -> None:
        """As `Region.read`."""
        import numpy as np

        first, columns = left // BF16.size, width // BF16.size
        codes = np.empty((rows, columns), dtype=np.uint8)
        self.codes.read(files, row, rows, first, columns, memoryview(codes).cast("B"))
        result = np.frombuffer(out, dtype=np.uint16).reshape(rows, columns)
        high, wide = self.block
        for band in range(row // high, -(-(row + rows) // high)):
            top, bottom = max(band * high - row, 0), min((band + 1) * high - row, rows)
            start, stop = first // wide, -(-(first + columns) // wide)
            scales = np.asarray(self.scales.row(files, band))[start:stop]
            for number, products in enumerate(fp8.products(scales), start):
                at = slice(max(number * wide - first, 0), (number + 1) * wide - first)
                result[top:bottom, at] = products[codes[top:bottom, at]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Repacked:
    """A band of blocks of a matrix of numbers, as codes or as the scales of those."""

    numbers: Matrix
    held: Dtype
    packed: Packed  # whose scales are read
    half: Half
    band: int

    @property
    def size(self) -> int:
        if self.half == "codes":
            return self._rows * self.packed.shape[1]
        return self.packed.scales.row_bytes

    @property
    def _rows(self) -> int:
        high = self.packed.form.block[0]
        return min(high, self.packed.shape[0] - self.band * high)

    def fill(self, files: Files, out: memoryview) -> None:
        import numpy as np

        packed, (high, wide) = self.packed, self.packed.form.block
        dtype = BY_SAFETENSORS[packed.scales.dtype]
        old = np.asarray(_Scales(region=region_of(packed.scales), dtype=dtype).row(files, self.band))
        new, rows, columns = np.empty_like(old), self._rows, packed.shape[1]
        held = np.empty((rows, columns * self.held.size), dtype=np.uint8)
        self.numbers.read(files, self.band * high, rows, 0, self.numbers.width, memoryview(held).cast("B"))
        codes = np.frombuffer(out, dtype=np.uint8).reshape(rows, columns) if self.half == "codes" else None
        for number, scale in enumerate(old):
            at = slice(number * wide, min((number + 1) * wide, columns))
            block = np.ascontiguousarray(held[:, at.start * self.held.size : at.stop * self.held.size])
            values = to_float32(memoryview(block).cast("B"), self.held).reshape(rows, -1)
            try:
                made, new[number] = fp8.requantize(values, scale, powers_of_two=packed.form.powers_of_two)
            except fp8.NotFiniteError:
                raise UserError(
                    f"{packed.name} holds NaN or infinity, which were not there before; train on from a checkpoint "
                    "without them, or convert without --quantized to look at it"
                ) from None
            if codes is not None:
                codes[:, at] = made
        if self.half == "scales":
            out[:] = from_float32(new, dtype)


def repacked(numbers: Matrix, held: Dtype, packed: Packed, half: Half) -> Iterator[Repacked]:
    """A matrix of numbers of type `held` as one of the two tensors that it is stored as."""
    for band in range(-(-packed.shape[0] // packed.form.block[0])):
        yield Repacked(numbers=numbers, held=held, packed=packed, half=half, band=band)
