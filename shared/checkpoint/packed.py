"""Weights as plain numbers, whether they are stored so or as codes and scales, and the way back into codes.

Numbers are made of codes when they are read, a window at a time, so that whoever moves a tensor's rows or columns need
not know how it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shared.checkpoint import blocks, fp8, mxfp4
from shared.checkpoint.blocks import Files
from shared.checkpoint.dtypes import BF16, Dtype, to_float32
from shared.checkpoint.region import Matrix, Region, region_of
from shared.checkpoint.safetensors_file import TensorInfo
from shared.errors import UserError
from shared.mapping.layout import Shape
from shared.mapping.quantization import Fp8Blocks, Mxfp4, Quantization

if TYPE_CHECKING:
    import numpy as np

Half = Literal["codes", "scales"]
_BLOCKS = "_blocks"
_AT_ONCE = 1 << 13  # groups; making codes of them holds several copies


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight that is stored as codes and scales."""

    name: str
    codes: TensorInfo
    scales: TensorInfo
    form: Quantization

    @property
    def shape(self) -> Shape:
        """Of the plain numbers."""
        if self.across:
            *outer, rows, groups, _ = self.codes.shape
            return (*outer, groups * mxfp4.GROUP, rows)
        return self.codes.shape

    @property
    def across(self) -> bool:
        """Whether the rows that are packed are columns of the plain numbers."""
        return isinstance(self.form, Mxfp4)

    @property
    def halves(self) -> dict[str, Half]:
        """Names of the two tensors."""
        return {self.codes.name: "codes", self.scales.name: "scales"}

    @property
    def strip_bytes(self) -> int:
        """Bytes that making its codes takes at most: a band of blocks, in fp32, and its codes."""
        if isinstance(self.form, Mxfp4):
            return 0  # as much as any change of type
        return min(self.form.block[0], self.shape[0]) * self.shape[1] * 5

    def at(self, index: Shape) -> Packed:
        """The slice at a place on its first axes."""
        return replace(self, codes=sliced(self.codes, index), scales=sliced(self.scales, index))

    def matrix(self) -> Matrix:
        """The numbers in bf16, by the rows that are packed."""
        if isinstance(self.form, Mxfp4):
            codes = region_of(self.codes)
            return Mxfp4Numbers(
                name=self.name,
                rows=codes.rows,
                width=codes.width // mxfp4.CODES * mxfp4.GROUP * BF16.size,
                codes=codes,
                scales=region_of(self.scales),
            )
        return _Decoded(
            name=self.name,
            rows=self.shape[0],
            width=self.shape[1] * BF16.size,
            codes=region_of(self.codes),
            scales=_Scales(tensor=self.scales),
            block=self.form.block,
        )


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of plain numbers, as a checkpoint has it."""

    tensor: TensorInfo  # as if they were stored so
    packed: Packed | None = None
    joined: Region | None = None  # where it is in parts in several files

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
        parts = self.joined.boxes if self.joined else self.stored
        return frozenset(part.file for part in parts)

    def at(self, index: Shape) -> Weight:
        """The slice at a place on its first axes."""
        if not index:
            return self
        return replace(self, tensor=sliced(self.tensor, index), packed=self.packed and self.packed.at(index))

    @property
    def across(self) -> bool:
        """Whether its matrix is the other way round than its shape."""
        return self.packed is not None and self.packed.across

    def matrix(self) -> Matrix:
        """Its rows."""
        return self.packed.matrix() if self.packed else self.joined or region_of(self.tensor)


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
    packed: dict[str, Packed] = {}  # by the name of the codes
    for tensor in tensors.values():
        if isinstance(form, Mxfp4) and tensor.name.endswith(_BLOCKS):
            packed[tensor.name] = _grouped(form, tensor, tensors)
        elif tensor.dtype == "F8_E4M3":
            packed[tensor.name] = _packed(form, tensor, tensors)
    scales = {weight.scales.name for weight in packed.values()}
    for name, tensor in tensors.items():
        if weight := packed.get(name):
            size = prod(weight.shape) * BF16.size
            plain = replace(tensor, name=weight.name, dtype=BF16.safetensors, shape=weight.shape, size=size)
            found[weight.name] = Weight(tensor=plain, packed=weight)
        elif name not in scales:
            found[name] = Weight(tensor=tensor)
    return found


def _grouped(form: Mxfp4, codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Packed:
    name = codes.name.removesuffix(_BLOCKS)
    scales = tensors.get(f"{name}_scales")
    if codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[-1] != mxfp4.CODES:
        raise UserError(
            f"{codes.place}: {codes.name} is {codes.dtype}{list(codes.shape)}; U8 by groups of 16 is wanted"
        )
    if scales is None:
        raise UserError(f"{codes.place}: {name}_scales is missing, beside {codes.name}; fetch the model again")
    if (scales.dtype, scales.shape) != ("U8", codes.shape[:-1]):
        raise UserError(
            f"{scales.place}: {scales.name} is {scales.dtype}{list(scales.shape)}; {codes.name} asks for "
            f"U8{list(codes.shape[:-1])}"
        )
    return Packed(name=name, codes=codes, scales=scales, form=form)


def _packed(form: Quantization | None, codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Packed:
    if not isinstance(form, Fp8Blocks):
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
    if scales.dtype not in fp8.SCALE_TYPES:
        known = " or ".join(fp8.SCALE_TYPES)
        raise UserError(f"{scales.place}: {name} is {scales.dtype}; scales of {known} are wanted")
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

    tensor: TensorInfo

    def row(self, files: Files, row: int) -> np.ndarray:
        """One row as float32; UserError for NaN, of which no codes could be made again."""
        import numpy as np

        region = region_of(self.tensor)
        data = memoryview(bytearray(region.width))
        region.read(files, row, 1, 0, region.width, data)
        scales = fp8.read_scales(data, self.tensor.dtype)
        if np.isnan(scales).any():
            raise UserError(f"{self.tensor.place}: {self.tensor.name} holds NaN in row {row}; fetch the model again")
        return scales


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
            scales = self.scales.row(files, band)[start:stop]
            for number, products in enumerate(fp8.products(scales), start):
                at = slice(max(number * wide - first, 0), (number + 1) * wide - first)
                result[top:bottom, at] = products[codes[top:bottom, at]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mxfp4Numbers:
    """bf16 numbers, made of codes in groups and their scales when they are read."""

    name: str
    rows: int
    width: int
    codes: Region
    scales: Region

    def read(self, files: Files, row: int, rows: int, left: int, width: int, out: memoryview) -> None:
        """As `Region.read`, of whole groups."""
        import numpy as np

        whole = mxfp4.GROUP * BF16.size
        first, groups = left // whole, width // whole
        assert (first * whole, groups * whole) == (left, width), f"{self.name}: {left} to {left + width}"
        codes = np.empty((rows * groups, mxfp4.CODES), dtype=np.uint8)
        scales = np.empty(rows * groups, dtype=np.uint8)
        at, wide = first * mxfp4.CODES, groups * mxfp4.CODES
        self.codes.read(files, row, rows, at, wide, memoryview(codes).cast("B"))
        self.scales.read(files, row, rows, first, groups, memoryview(scales))
        result = np.frombuffer(out, dtype=np.uint16).reshape(-1, mxfp4.GROUP)
        for start in range(0, len(codes), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            result[part] = mxfp4.decode(codes[part], scales[part])


@dataclass(frozen=True, kw_only=True, slots=True)
class Regrouped:
    """Rows of a matrix of numbers, as codes in groups or as the scales of those."""

    numbers: Matrix
    held: Dtype
    packed: Packed  # whose scales are read
    half: Half
    row: int
    rows: int

    @property
    def groups(self) -> int:
        """In a row."""
        return self.packed.scales.row_bytes

    @property
    def size(self) -> int:
        return self.rows * self.groups * (mxfp4.CODES if self.half == "codes" else 1)

    def fill(self, files: Files, out: memoryview) -> None:
        import numpy as np

        held = memoryview(bytearray(self.rows * self.numbers.width))
        self.numbers.read(files, self.row, self.rows, 0, self.numbers.width, held)
        old = np.empty(self.rows * self.groups, dtype=np.uint8)
        region_of(self.packed.scales).read(files, self.row, self.rows, 0, self.groups, memoryview(old))
        result = np.frombuffer(out, dtype=np.uint8).reshape(len(old), -1)
        step = mxfp4.GROUP * self.held.size
        for start in range(0, len(old), _AT_ONCE):
            stop = min(start + _AT_ONCE, len(old))
            values = to_float32(held[start * step : stop * step], self.held).reshape(-1, mxfp4.GROUP)
            try:
                codes, scales = mxfp4.requantize(values, old[start:stop])
            except fp8.NotFiniteError:
                raise _not_finite(self.packed) from None
            result[start:stop] = codes if self.half == "codes" else scales[:, None]


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
        high, _ = self._block
        return min(high, self.packed.shape[0] - self.band * high)

    @property
    def _block(self) -> tuple[int, int]:
        assert isinstance(self.packed.form, Fp8Blocks)
        return self.packed.form.block

    def fill(self, files: Files, out: memoryview) -> None:
        import numpy as np

        packed, (high, wide) = self.packed, self._block
        assert isinstance(packed.form, Fp8Blocks)
        even = packed.form.powers_of_two or packed.scales.dtype == fp8.E8M0
        old = _Scales(tensor=packed.scales).row(files, self.band)
        new, rows, columns = np.empty_like(old), self._rows, packed.shape[1]
        held = np.empty((rows, columns * self.held.size), dtype=np.uint8)
        self.numbers.read(files, self.band * high, rows, 0, self.numbers.width, memoryview(held).cast("B"))
        codes = np.frombuffer(out, dtype=np.uint8).reshape(rows, columns) if self.half == "codes" else None
        for number, scale in enumerate(old):
            at = slice(number * wide, min((number + 1) * wide, columns))
            block = np.ascontiguousarray(held[:, at.start * self.held.size : at.stop * self.held.size])
            values = to_float32(memoryview(block).cast("B"), self.held).reshape(rows, -1)
            try:
                made, new[number] = fp8.requantize(values, scale, powers_of_two=even)
            except fp8.NotFiniteError:
                raise _not_finite(packed) from None
            if codes is not None:
                codes[:, at] = made
        if self.half == "scales":
            out[:] = fp8.write_scales(new, packed.scales.dtype)


def _not_finite(packed: Packed) -> UserError:
    return UserError(
        f"{packed.name} holds NaN or infinity, which were not there before; train on from a checkpoint without them, or "
        "convert without --quantized to look at it"
    )


def repacked(numbers: Matrix, held: Dtype, packed: Packed, half: Half) -> Iterator[Repacked | Regrouped]:
    """A matrix of numbers of type `held` as one of the two tensors that it is stored as."""
    if isinstance(packed.form, Mxfp4):
        step = max(blocks.BLOCK // numbers.width, 1)
        for row in range(0, numbers.rows, step):
            rows = min(step, numbers.rows - row)
            yield Regrouped(numbers=numbers, held=held, packed=packed, half=half, row=row, rows=rows)
        return
    for band in range(-(-packed.shape[0] // packed.form.block[0])):
        yield Repacked(numbers=numbers, held=held, packed=packed, half=half, band=band)
