"""E4M3 against torch.float8_e4m3fn, and the exact round trip of every code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.checkpoint.dtypes import BF16, to_float32
from shared.quantized import fp8_blocks as fp8

CODES = torch.arange(256, dtype=torch.uint8)
NAN = (0x7F, 0xFF)


def decoded(codes: np.ndarray, scale: np.float32) -> np.ndarray:
    return to_float32(memoryview(fp8.product_table(scale)), BF16)[codes]


def test_code_values_are_torchs() -> None:
    theirs = CODES.view(torch.float8_e4m3fn).float().numpy()
    finite = [code for code in range(256) if code not in NAN]
    assert np.array_equal(fp8.code_values().view(np.uint32)[finite], theirs.view(np.uint32)[finite])
    assert np.isnan(fp8.code_values()[list(NAN)]).all()


def test_codes_are_torchs() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(1 << 18).astype(np.float32) * np.exp(generator.uniform(-9, 6, 1 << 18))
    edges = np.concatenate(
        [(fp8.code_values()[:126] + fp8.code_values()[1:127]) / 2, fp8.code_values()[:127]]
    )  # ties, and exact
    near = np.concatenate([edges, np.nextafter(edges, np.float32(1e9)), np.nextafter(edges, np.float32(-1e9))])
    values = np.concatenate([values, near, -near]).astype(np.float32).clip(-448, 448)
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(fp8.encode(values), theirs)
    assert list(fp8.encode(np.array([1e30, -1e30, np.nan, -0.0], dtype=np.float32))) == [0x7E, 0xFE, 0x7F, 0x80]


def scales() -> np.ndarray:
    """Mantissas of all sorts at every exponent for which products stay normal in bf16, and both ends."""
    generator = np.random.default_rng(1)
    exponents = np.repeat(np.arange(-117, 119, dtype=np.int32), 24)
    random = np.ldexp(generator.uniform(1, 2, len(exponents)), exponents).astype(np.float32)
    return np.concatenate([random, -random[::7], np.ldexp(np.float32(1), np.arange(-117, 120)).astype(np.float32)])


def test_products_are_those_of_an_fp32_product_rounded_once() -> None:
    some = scales()
    exact = CODES.view(torch.float8_e4m3fn).float() * torch.from_numpy(some)[:, None]
    theirs = exact.bfloat16().view(torch.int16).numpy().view(np.uint16)
    finite = [code for code in range(256) if code not in NAN]
    assert np.array_equal(fp8.product_table(some)[:, finite], theirs[:, finite])
    assert np.isnan(to_float32(memoryview(fp8.product_table(some)), BF16).reshape(-1, 256)[:, list(NAN)]).all()


def test_every_code_comes_back_whatever_the_scale() -> None:
    """NaN, both zeros and subnormal numbers too."""
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for scale in scales():
        found, kept = fp8.requantize(decoded(codes, scale), scale, powers_of_two=False)
        assert np.array_equal(found, codes), scale
        assert kept == scale


def test_zeros_keep_any_scale() -> None:
    zeros = np.array([[0, 0x80]], dtype=np.uint8)
    for scale in (np.float32(0), np.float32(1e-45), np.float32(3e38)):
        found, kept = fp8.requantize(decoded(zeros, scale), scale, powers_of_two=False)
        assert np.array_equal(found, zeros)
        assert kept == scale


def test_limits_of_the_round_trip() -> None:
    """Products that bf16 has no normal number for are equal for several codes: values come back, codes may not."""
    codes = np.arange(1, 16, dtype=np.uint8)[None]
    for scale in (np.float32(2.0**-130), np.float32(1e-45)):
        numbers = decoded(codes, scale)
        found, _ = fp8.requantize(numbers, scale, powers_of_two=False)
        assert not np.array_equal(found, codes)


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_a_changed_block_has_a_scale_of_its_own(powers_of_two: bool) -> None:
    values = np.random.default_rng(2).standard_normal((128, 128)).astype(np.float32)
    codes, scale = fp8.requantize(values, np.float32(0.5), powers_of_two=powers_of_two)
    largest = np.abs(values).max()
    if powers_of_two:
        assert np.log2(scale) == np.ceil(np.log2(largest / np.float32(448)))
    else:
        assert scale == largest / np.float32(448)
        assert codes.max() | 0x80 == 0xFE
    theirs = (torch.from_numpy(values) / float(scale)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(codes, theirs)
    again, same = fp8.requantize(decoded(codes, scale), scale, powers_of_two=powers_of_two)
    assert np.array_equal(again, codes)
    assert same == scale


def test_powers_of_two_stay_what_they_are() -> None:
    values = np.array([[448.0 / 64, 0.3]], dtype=np.float32)
    assert fp8.requantize(values, np.float32(1), powers_of_two=True)[1] == np.float32(1 / 64)


def test_e8m0_scales_are_torchs() -> None:
    exact = CODES.view(torch.float8_e8m0fnu).double().numpy()
    found = fp8.read_scales(memoryview(CODES.numpy()), fp8.E8M0)
    assert found.dtype == np.float32
    assert np.array_equal(found.astype(np.float64), exact, equal_nan=True)
    assert np.isnan(exact).nonzero()[0].tolist() == [255]
    assert np.isnan(found[255])
    assert bytes(fp8.write_scales(found[:255], fp8.E8M0)) == bytes(range(255))
    assert found[0] == 2.0**-127  # which fp32 has as a subnormal number


def test_values_with_e8m0_scales_are_exact() -> None:
    """In float64, for every code and every scale whose products bf16 has normal numbers for."""
    exponents = np.arange(10, 246, dtype=np.uint8)
    some = fp8.read_scales(memoryview(exponents), fp8.E8M0)
    exact = (
        CODES.view(torch.float8_e4m3fn).double()
        * torch.from_numpy(exponents).view(torch.float8_e8m0fnu).double()[:, None]
    )
    ours = to_float32(memoryview(fp8.product_table(some)), BF16).reshape(-1, 256).astype(np.float64)
    assert np.array_equal(ours, exact.numpy(), equal_nan=True)


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_a_block_of_the_smallest_numbers_has_a_scale(powers_of_two: bool) -> None:
    values = np.array([[1e-44, -1e-40]], dtype=np.float32)
    codes, scale = fp8.requantize(values, np.float32(0.5), powers_of_two=powers_of_two)
    assert scale == 2.0**-126
    assert np.array_equal(
        codes, (torch.from_numpy(values) / float(scale)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_changed_block_must_be_finite(bad: float) -> None:
    values = np.array([[1.1, bad]], dtype=np.float32)
    with pytest.raises(fp8.NotFiniteError):
        fp8.requantize(values, np.float32(0.7), powers_of_two=False)
