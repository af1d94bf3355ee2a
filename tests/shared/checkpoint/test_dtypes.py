"""Casts between dtypes against torch and against tables of all 16-bit numbers, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.checkpoint.dtypes import (
    BF16,
    FP16,
    FP32,
    FP64,
    Dtype,
    add,
    cast,
    common,
    count_not_finite,
    from_float64,
    normalize_row,
    to_float64,
    weight_dtype,
)
from shared.errors import UserError

TORCH = {BF16: torch.bfloat16, FP16: torch.float16, FP32: torch.float32}


def all_16_bit_patterns() -> memoryview:
    return memoryview(np.arange(1 << 16, dtype=np.uint16)).cast("B")


def float32_patterns() -> memoryview:
    """Random bits, and the ties, overflows and subnormals that rounding gets wrong."""
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    edges = [
        0x3F808000,
        0x3F818000,
        0x3F807FFF,
        0x7F7FFFFF,
        0x7F800000,
        0xFF800000,
        0x7F800001,
        0x7FC00000,
        1,
        0x80000000,
    ]
    return memoryview(np.concatenate([random, np.array(edges, dtype=np.uint32)])).cast("B")


def as_torch(data: memoryview, dtype: Dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=TORCH[dtype])


@pytest.mark.parametrize("target", [BF16, FP16], ids=lambda d: d.name)
def test_downcast_is_torch_s(target: Dtype) -> None:
    data = float32_patterns()
    ours, theirs = as_torch(cast(data, FP32, target), target), as_torch(data, FP32).to(TORCH[target])
    assert torch.equal(ours.isnan(), theirs.isnan())
    kept = ~theirs.isnan()
    assert torch.equal(ours[kept].view(torch.int16), theirs[kept].view(torch.int16))


@pytest.mark.parametrize("source", [BF16, FP16], ids=lambda d: d.name)
def test_upcast_is_torch_s_and_undone_exactly(source: Dtype) -> None:
    data = all_16_bit_patterns()
    wide = cast(data, source, FP32)
    theirs = as_torch(data, source).to(torch.float32)
    kept = ~theirs.isnan()
    assert torch.equal(as_torch(wide, FP32)[kept], theirs[kept])
    back = np.frombuffer(cast(wide, FP32, source), np.uint16)
    numbers = np.isfinite(theirs.numpy()) | np.isinf(theirs.numpy())
    assert np.array_equal(back[numbers], np.arange(1 << 16, dtype=np.uint16)[numbers])
    if source is BF16:  # a NaN's payload, too
        assert np.array_equal(back, np.arange(1 << 16, dtype=np.uint16))


def test_same_type_is_not_touched() -> None:
    data = all_16_bit_patterns()
    assert cast(data, BF16, BF16) is data


@pytest.mark.parametrize("source", [BF16, FP16, FP32], ids=lambda d: d.name)
def test_one_less_in_float64_is_undone_exactly(source: Dtype) -> None:
    values = as_torch(float32_patterns() if source is FP32 else all_16_bit_patterns(), source)
    values = values[(values == 0) & ~values.signbit() | (values.abs() > 2e-9) & (values.abs() < 1e15)]
    bits = torch.int32 if source is FP32 else torch.int16
    data = memoryview(values.view(bits).numpy()).cast("B")
    held = add(data, -1.0, source, FP64)
    assert torch.equal(torch.frombuffer(bytearray(held), dtype=torch.float64), values.double() - 1)
    assert add(held, 1.0, FP64, source) == data


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=lambda d: d.name)
def test_counting_nan_and_infinity(dtype: Dtype) -> None:
    data = float32_patterns() if dtype is FP32 else all_16_bit_patterns()
    values = as_torch(data, dtype)
    assert count_not_finite(data, dtype) == (int(values.isnan().sum()), int(values.isinf().sum()))


def test_common_type_holds_all_exactly() -> None:
    assert common([BF16, BF16]) is BF16
    assert common([BF16, FP32]) is FP32
    assert common([BF16, FP16]) is FP32
    assert common([FP64, BF16]) is FP64


def test_quantised_weight_is_named() -> None:
    with pytest.raises(UserError, match=r"a\.safetensors: w is F8_E4M3"):
        weight_dtype("F8_E4M3", "w", "a.safetensors")


def all_16_bit_numbers(dtype: Dtype) -> np.ndarray:
    """Positive numbers in order of their bit patterns, and where infinity begins."""
    patterns = np.arange({BF16: 0x7F80, FP16: 0x7C00}[dtype], dtype=np.uint16)
    return np.append(to_float64(memoryview(patterns).cast("B"), dtype), {BF16: 2.0**128, FP16: 2.0**16}[dtype])


def rounded(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Bit patterns of the nearest 16-bit numbers, found in the table of all."""
    table, sizes = all_16_bit_numbers(dtype), np.abs(values)
    place = np.clip(np.searchsorted(table, sizes, side="right") - 1, 0, len(table) - 2)
    middle = (table[place] + table[place + 1]) / 2  # exact
    place += (sizes > middle) | ((sizes == middle) & (place % 2 == 1))
    return (place | np.signbit(values) << 15).astype(np.uint16)


@pytest.mark.parametrize("target", [BF16, FP16], ids=lambda d: d.name)
def test_float64_is_rounded_once(target: Dtype) -> None:
    """A number just beside a tie: float32 would put it on the tie, and the second rounding to the even neighbour."""
    table = all_16_bit_numbers(target)
    ties = (table[1:] + table[:-1]) / 2
    beside = [np.nextafter(ties, np.inf), np.nextafter(ties, 0), ties * (1 + 2.0**-30), ties * (1 - 2.0**-30)]
    values = np.concatenate([table, ties, *beside, np.geomspace(1e-300, 1e300, 10_000), [np.inf]])
    values = np.concatenate([values, -values])
    data = memoryview(values).cast("B")
    wanted = rounded(values, target)
    for made in (from_float64(values, target), cast(data, FP64, target), add(data, 0.0, FP64, target)):
        assert np.array_equal(np.frombuffer(made, np.uint16) & 0x7FFF, wanted & 0x7FFF)  # -0 + 0 is 0
    assert np.array_equal(np.frombuffer(from_float64(values, target), np.uint16), wanted)
    assert np.isnan(to_float64(from_float64(np.array([np.nan]), target), target)).all()


@pytest.mark.parametrize("target", TORCH, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("source", TORCH, ids=lambda dtype: dtype.name)
def test_rows_of_unit_length_are_torch_s_of_float64(source: Dtype, target: Dtype) -> None:
    """Within an ulp: the order of the squares' sum is each library's own. A row of zeros stays one, where torch's own in half
    precision, which has no 1e-12, is NaN.
    """
    rows = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).to(TORCH[source])
    rows[3], rows[4, 5], rows[6, 7] = 0, torch.nan, torch.inf
    for row in rows:
        made = normalize_row(memoryview(row.view(torch.uint8).numpy()), source, target)
        wanted = torch.nn.functional.normalize(row.double(), dim=0)
        found = torch.frombuffer(bytearray(made), dtype=TORCH[target]).double()
        assert torch.equal(found.isnan(), wanted.isnan())
        ulp = wanted.abs().clamp(min=torch.finfo(TORCH[target]).tiny) * torch.finfo(TORCH[target]).eps
        assert ((found - wanted).abs() <= ulp)[~wanted.isnan()].all()
