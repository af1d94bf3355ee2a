"""MXFP4 against transformers, and the exact round trip of every code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.checkpoint.dtypes import BF16, to_float32
from shared.quantized import mxfp4
from shared.quantized.fp8_blocks import NotFiniteError

SCALES = np.arange(256, dtype=np.uint8)
# All codes, and each of them in the other half of a byte.
CODES = np.tile(np.array([n | (15 - n) << 4 for n in range(16)], dtype=np.uint8), (256, 1))
LAST = 253  # from which on products with the largest code overflow


def values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return to_float32(memoryview(mxfp4.decode(codes, scales)).cast("B"), BF16).reshape(-1, 32)


def test_numbers_are_those_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    theirs = convert_moe_packed_tensors(torch.from_numpy(CODES)[None, :, None], torch.from_numpy(SCALES)[None, :, None])
    ours = torch.from_numpy(mxfp4.decode(CODES, SCALES).view(np.int16)).view(torch.bfloat16)
    theirs = theirs[0].T.contiguous()
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def test_every_code_comes_back_whatever_the_scale() -> None:
    scales = SCALES[:LAST]
    codes, kept = mxfp4.requantize(values(CODES[:LAST], scales), scales)
    assert np.array_equal(codes, CODES[:LAST])
    assert np.array_equal(kept, scales)


@pytest.mark.parametrize("exponent", [-100, -3, 0, 90])
def test_a_changed_group_has_a_scale_of_its_own(exponent: int) -> None:
    generator = np.random.default_rng(exponent + 200)
    numbers = (generator.standard_normal((500, 32)) * 2.0**exponent).astype(np.float32)
    codes, scales = mxfp4.requantize(numbers, np.full(500, 127, dtype=np.uint8))
    largest = np.abs(numbers).max(axis=1)
    assert np.array_equal(scales.astype(int) - 127, np.ceil(np.log2(largest / np.float32(6))).astype(int))
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = np.abs(numbers.astype(np.float64)) / 2.0 ** (scales.astype(int) - 127)[:, None]
    nearest = np.abs(scaled[..., None] - grid).min(axis=-1)
    found = np.abs(values(codes, scales).astype(np.float64)) / 2.0 ** (scales.astype(int) - 127)[:, None]
    assert np.allclose(np.abs(found - scaled), nearest, atol=1e-12)
    assert np.array_equal(np.signbit(values(codes, scales)), np.signbit(numbers))


def test_ties_go_to_the_even_code() -> None:
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], dtype=np.float32)
    numbers = np.tile(ties, 4)[None]
    codes, scales = mxfp4.requantize(numbers, np.array([127], dtype=np.uint8))
    assert scales.tolist() == [127]
    assert values(codes, scales)[0, :8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_changed_group_must_be_finite(bad: float) -> None:
    numbers = np.full((1, 32), 1.1, dtype=np.float32)
    numbers[0, 3] = bad
    with pytest.raises(NotFiniteError):
        mxfp4.requantize(numbers, np.array([127], dtype=np.uint8))
