"""Scales against float64; the history against a list."""

from __future__ import annotations

import math
import random

import pytest
import torch

from shared.kernels.fp8.codes import E4M3, E5M2, LARGEST, count, encode
from shared.kernels.fp8.scales import WARM_UP, History, amax, scale_of

DTYPES = (E4M3, E5M2)


def random_amax() -> torch.Tensor:
    """Over the range of fp32 in which scales are normal numbers."""
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-100, 120, (10_000,), generator=generator).double()
    return (torch.rand(10_000, generator=generator).double() + 0.5).mul(2.0**exponents).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_is_amax_by_the_largest_number(dtype):
    found = random_amax()
    scale = scale_of(found, dtype, power_of_two=False)
    exact = found.double() / LARGEST[dtype]
    assert ((scale.double() - exact).abs() <= exact * 2.0**-24).all()  # one rounding of fp32
    # So the largest number has the largest code, and is not clipped.
    assert (encode(found / scale, dtype).float() == LARGEST[dtype]).all()
    assert count(found / scale, dtype)[0] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_power_of_two_is_the_next_above(dtype):
    found = torch.cat([random_amax(), LARGEST[dtype] * 2.0 ** torch.arange(-60, 60).float()])
    scale = scale_of(found, dtype, power_of_two=True)
    exact = (found.double() / LARGEST[dtype]).tolist()
    # log2 of a double that is a power of two is exact; the others are far enough from one.
    assert scale.tolist() == [2.0 ** math.ceil(math.log2(number)) for number in exact]
    assert count(found / scale, dtype)[0] == 0


def test_scales_of_zeros_and_of_tiny_numbers_can_be_divided_by():
    for power_of_two in (False, True):
        scale = scale_of(torch.tensor([0.0, 1e-45, 1e-38]), E5M2, power_of_two=power_of_two)
        assert scale[0] == 1.0
        assert (scale >= torch.finfo(torch.float32).tiny).all()


def test_amax_of_axes_of_nothing_and_of_what_is_not_finite():
    x = torch.tensor([[1.0, -5.0], [3.0, 2.0]]).bfloat16()
    assert amax(x, (0, 1)).tolist() == [[5.0]]
    assert amax(x, (1,)).tolist() == [[5.0], [3.0]]
    assert amax(x, (0,)).dtype == torch.float32
    assert amax(x[:0], (0,)).tolist() == [[0.0, 0.0]]
    assert amax(torch.tensor([[1.0, torch.nan]]), (0, 1)).isnan().all()
    assert amax(torch.tensor([[1.0, -torch.inf]]), (0, 1)).tolist() == [[torch.inf]]


@pytest.mark.parametrize("length", [1, 3, 1024])
def test_a_history_is_the_last_updates_newest_first(length):
    history, given, source = History(length), [], random.Random(length)
    assert history.highest is None
    for _ in range(40):
        value = source.choice([0.0, source.random()])
        history.append(value)
        given = [value, *given] if value else given
        assert history.values == given[:length]
        assert history.highest == (max(given[:length]) if len(given) >= min(length, WARM_UP) else None)
    assert len(given) > WARM_UP
    shorter = History(2)
    shorter.restore(history.values)
    assert shorter.values == given[: min(2, length)]
