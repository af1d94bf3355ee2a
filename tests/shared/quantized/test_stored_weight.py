"""Quantised weights, dequantised in any window, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.operations import stream
from shared.checkpoint.dtypes import BF16
from shared.checkpoint.formats.safetensors_file import read_header
from shared.quantized.scheme import Fp8Blocks
from shared.quantized.stored_weight import QuantizedWeight, assemble_weights, quantize

pytest.importorskip("transformers")
FORM = Fp8Blocks()


def stored(path: Path, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, QuantizedWeight]:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(256, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 1  # NaN's bits are nobody's promise
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) / 100
    save_file({"w": codes.view(torch.float8_e4m3fn), "w_scale_inv": scales}, path / "w.safetensors")
    quantized = assemble_weights(FORM, {t.name: t for t in read_header(path / "w.safetensors").tensors})["w"].quantized
    assert quantized
    return codes.view(torch.float8_e4m3fn), scales, quantized


def window(quantized: QuantizedWeight, row: int, rows: int, first: int, columns: int) -> torch.Tensor:
    out = bytearray(rows * columns * 2)
    with OpenFiles() as files:
        quantized.view().read(files, row, rows, 2 * first, 2 * columns, memoryview(out))
    return torch.frombuffer(out, dtype=torch.bfloat16).view(rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (576, 200), (1, 1), (130, 128)])
def test_numbers_are_those_of_transformers(tmp_path: Path, rows: int, columns: int) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

    codes, scales, quantized = stored(tmp_path, rows, columns)
    theirs = _dequantize_fp8_weight(codes, scales, FORM.block, torch.float32).bfloat16()
    if rows % 128 == columns % 128 == 0:  # it refuses others
        assert torch.equal(theirs, Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16))
    assert torch.equal(window(quantized, 0, rows, 0, columns).view(torch.int16), theirs.view(torch.int16))
    generator = np.random.default_rng(0)
    for _ in range(20):
        row, first = int(generator.integers(rows)), int(generator.integers(columns))
        height, width = int(generator.integers(1, rows - row + 1)), int(generator.integers(1, columns - first + 1))
        part = window(quantized, row, height, first, width)
        assert torch.equal(part.view(torch.int16), theirs[row : row + height, first : first + width].view(torch.int16))


@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (576, 200), (130, 128)])
def test_both_components_round_trip(tmp_path: Path, rows: int, columns: int) -> None:
    codes, scales, quantized = stored(tmp_path, rows, columns)

    def bytes_of(operations: Callable[[], object]) -> bytes:
        with OpenFiles() as files:
            return b"".join(bytes(block) for block in stream(operations(), files))  # type: ignore[arg-type]

    made = bytes_of(lambda: quantize(quantized.view(), BF16, quantized, "codes"))
    assert made == codes.view(torch.uint8).numpy().tobytes()
    assert bytes_of(lambda: quantize(quantized.view(), BF16, quantized, "scales")) == scales.numpy().tobytes()
