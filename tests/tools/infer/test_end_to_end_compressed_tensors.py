"""int4 groups read and written by `convert`, against the compressed-tensors library, which vLLM uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from shared.quantized import int4

ROWS, GROUPS = 300, 7
COLUMNS = GROUPS * int4.GROUP
WEIGHTS = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=int4.GROUP)
SCHEME = QuantizationScheme(targets=["Linear"], weights=WEIGHTS)


def as_bytes(words: torch.Tensor) -> np.ndarray:
    """`[groups, 16]` of codes, from int32 words `[rows, columns / 8]`."""
    return words.contiguous().numpy().view(np.uint8).reshape(-1, int4.CODES)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def test_dequantized_values_equal_those_of_compressed_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (ROWS, COLUMNS), generator=generator, dtype=torch.int8)
    exponents = torch.randint(-130, 120, (ROWS, GROUPS), generator=generator)
    scales = torch.ldexp(torch.rand(ROWS, GROUPS, generator=generator) + 0.5, exponents).bfloat16()
    state = {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    theirs = PackedQuantizationCompressor.decompress(state, SCHEME)["weight"]
    assert theirs.dtype == torch.bfloat16
    ours = int4.decode(as_bytes(state["weight_packed"]), bits(scales).reshape(-1))
    assert np.array_equal(ours.reshape(ROWS, COLUMNS), bits(theirs))


@pytest.mark.parametrize("size", [1e-30, 0.02, 3.0, 1e30])
def test_requantized_groups_equal_those_of_compressed_tensors(size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(ROWS, COLUMNS, generator=generator) * size).bfloat16()
    groups = weight.unflatten(-1, (GROUPS, int4.GROUP))
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), WEIGHTS)
    theirs = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scales}, SCHEME)
    values = groups.float().numpy().reshape(-1, int4.GROUP)
    codes, made = int4.requantize(values, np.full(len(values), 0x3F80, dtype=np.uint16))
    assert np.array_equal(made, bits(scales).reshape(-1))
    assert np.array_equal(codes, as_bytes(theirs["weight_packed"]))
