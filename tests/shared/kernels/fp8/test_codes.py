"""Codes of every bf16 number, and of random fp32 numbers, against the nearest FP8 number in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.kernels.fp8.codes import E4M3, E5M2, LARGEST, count, encode

DTYPES = (E4M3, E5M2)
# (exponent bits, mantissa bits, bias, code of the largest number): arXiv:2209.05433, table 1.
LAYOUT = {E4M3: (4, 3, 7, 0x7E), E5M2: (5, 2, 15, 0x7B)}


def numbers(dtype: torch.dtype) -> np.ndarray:
    """All finite numbers that are not negative, float64, by their code."""
    _, mantissa_bits, bias, last = LAYOUT[dtype]
    codes = np.arange(last + 1)
    exponent, mantissa = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / 2.0**mantissa_bits
    return np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))


def reference(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Codes of the nearest numbers, ties to the even code, infinities and what is too large to the largest."""
    known = numbers(dtype)
    size = np.minimum(np.abs(values), known[-1])
    upper = np.searchsorted(known, size)
    lower = np.maximum(upper - 1, 0)
    below, above = size - known[lower], known[upper] - size
    take_lower = (below < above) | ((below == above) & (lower % 2 == 0))
    return np.where(take_lower, lower, upper) | (np.signbit(values) << 7)


def bf16_numbers() -> torch.Tensor:
    """Every bit pattern, as fp32."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()


def fp32_numbers() -> torch.Tensor:
    """A million random bit patterns, every midpoint of FP8 numbers and its neighbours."""
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), generator=torch.Generator().manual_seed(0))
    found = [bits.to(torch.int32).view(torch.float32)]
    for dtype in DTYPES:
        known = torch.from_numpy(numbers(dtype)).float()
        middle = (known[1:] + known[:-1]) / 2
        for sign in (1, -1):
            found += [sign * middle, *(sign * torch.nextafter(middle, torch.tensor(end)) for end in (0.0, torch.inf))]
    return torch.cat(found)


@pytest.mark.parametrize("values", [bf16_numbers(), fp32_numbers()], ids=["bf16", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_code_is_that_of_the_nearest_number(values, dtype):
    codes = encode(values, dtype)
    finite = ~values.isnan()
    assert np.array_equal(codes.view(torch.uint8)[finite].numpy(), reference(values[finite].double().numpy(), dtype))
    assert codes[~finite].float().isnan().all()
    assert (~finite).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_lost_is_counted(dtype):
    values = bf16_numbers()
    values = values[values.isfinite()]
    clipped, underflow, nonzero = count(values, dtype).tolist()
    codes = reference(values.double().numpy(), dtype)
    known = numbers(dtype)
    step = known[-1] - known[-2]
    # Half a step above the largest is the tie; the number that would follow has an even code.
    too_large = values.abs().double() > known[-1] + step / 2
    tie = values.abs().double() == known[-1] + step / 2
    assert clipped == int(too_large.sum() + tie.sum())
    assert underflow == int(((codes & 0x7F) == 0).sum() - (values == 0).sum())
    assert nonzero == int((values != 0).sum())
    assert min(clipped, underflow) > 1000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_in_range_lose_nothing_but_digits(dtype):
    largest = LARGEST[dtype]
    values = torch.tensor([largest, -largest, largest * 1.03, 0.0, -0.0, 1.0])
    assert count(values, dtype).tolist() == [0, 0, 4]
    assert count(torch.zeros(0), dtype).tolist() == [0, 0, 0]
    assert encode(values, dtype).float().tolist() == [largest, -largest, largest, 0.0, 0.0, 1.0]
