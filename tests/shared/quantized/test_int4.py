"""Int4 groups against torch's bf16 arithmetic, and the exact round trip of every code and scale.

`tests/tools/infer/test_end_to_end_compressed_tensors.py` compares with the compressed-tensors library.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.checkpoint.dtypes import BF16, to_float32
from shared.quantized import int4
from shared.quantized.fp8_blocks import NotFiniteError

LAST = 0x7E00  # 2^125, from which on products overflow
SCALES = np.concatenate([np.arange(1, LAST, dtype=np.uint16), np.arange(0x8001, 0x8000 + LAST, dtype=np.uint16)])
# All codes, and each of them in the other half of a byte.
EVERY = np.array([n | (15 - n) << 4 for n in range(16)], dtype=np.uint8)
CODES = np.tile(EVERY, (len(SCALES), 1))


def values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return to_float32(memoryview(int4.decode(codes, scales)).cast("B"), BF16).reshape(-1, 32)


def test_numbers_are_products_in_bf16() -> None:
    numbers = (
        torch.stack([torch.from_numpy(CODES & 15), torch.from_numpy(CODES >> 4)], -1).flatten(1).to(torch.int8) - 8
    )
    scales = torch.from_numpy(SCALES.view(np.int16)).view(torch.bfloat16)
    theirs = numbers.to(torch.bfloat16) * scales[:, None]
    assert torch.equal(torch.from_numpy(int4.decode(CODES, SCALES).view(np.int16)), theirs.view(torch.int16))


def test_every_code_comes_back_whatever_the_scale() -> None:
    codes, kept = int4.requantize(values(CODES, SCALES), SCALES)
    assert np.array_equal(codes, CODES)
    assert np.array_equal(kept, SCALES)


def test_groups_of_a_scale_of_zero_stay_what_they_are() -> None:
    scales = np.zeros(1, dtype=np.uint16)
    zeros = values(EVERY[None], scales)
    codes, kept = int4.requantize(zeros, scales)
    assert np.array_equal(kept, scales)
    assert np.array_equal(values(codes, kept).view(np.uint32), zeros.view(np.uint32))


@pytest.mark.parametrize("exponent", [-100, -3, 0, 90])
def test_a_changed_group_is_quantised_as_bf16_weights_are(exponent: int) -> None:
    generator = np.random.default_rng(exponent + 200)
    numbers = (generator.standard_normal((500, 32)) * 2.0**exponent).astype(np.float32)
    numbers[7] = 0
    codes, scales = int4.requantize(numbers, np.full(500, 0x3F80, dtype=np.uint16))
    x = torch.from_numpy(numbers).bfloat16()
    wanted = x.abs().amax(-1) / 7.5
    wanted[7] = 1.0  # zeros are what they were, whatever the scale
    assert torch.equal(torch.from_numpy(scales.view(np.int16)).view(torch.bfloat16), wanted)
    rounded = (x / wanted[:, None]).clamp(-8, 7).round().to(torch.int8).numpy() + 8
    assert np.array_equal(codes & 15, rounded[:, 0::2])
    assert np.array_equal(codes >> 4, rounded[:, 1::2])


def test_a_changed_group_of_zeros_has_a_scale_that_is_not() -> None:
    codes, scales = int4.requantize(np.full((1, 32), -0.0, dtype=np.float32), np.array([0x3F80], dtype=np.uint16))
    assert scales.view(np.int16)[0] == torch.tensor(2.0**-7).bfloat16().view(torch.int16)
    assert (codes == 0x88).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_changed_group_must_be_finite(bad: float) -> None:
    numbers = np.full((1, 32), 1.1, dtype=np.float32)
    numbers[0, 3] = bad
    with pytest.raises(NotFiniteError):
        int4.requantize(numbers, np.array([0x3F80], dtype=np.uint16))


@pytest.mark.parametrize("scale", [0x7F80, 0xFF80, 0x7FC0])
def test_scales_must_be_finite(scale: int) -> None:
    with pytest.raises(NotFiniteError):
        int4.decode(EVERY[None], np.array([scale], dtype=np.uint16))
