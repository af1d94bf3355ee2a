"""Kernels against torch's operations, byte for byte: in Triton's interpreter, and on a GPU; and compiled for Hopper anywhere."""

from __future__ import annotations

import re

import pytest
import torch

from shared.kernels.fp8.codes import _CLIPPED_ABOVE, _ZERO_BELOW, LARGEST
from tests.shared.kernels.fp8.examples import compiled_for_hopper


def test_every_code_is_torchs(interpreted):
    found = {case: fields for case, fields in interpreted.items() if case.startswith("codes")}
    assert len(found) == 4
    assert not any(found.values()), found


@pytest.mark.parametrize("function", ["row_amax", "encode_matrix", "encode_blocks"])
def test_amax_scales_codes_and_counts_are_torchs(interpreted, function):
    found = {case: fields for case, fields in interpreted.items() if case.startswith(function)}
    # With NaN or infinity a run stops: its codes say nothing, amax and counts are compared.
    finite = {case: fields for case, fields in found.items() if not re.search(r" (-?inf|nan)( |$)", case)}
    assert len(found) > len(finite) >= 4
    assert not any(finite.values()), {case: fields for case, fields in finite.items() if fields}
    assert not any("amax" in fields for fields in found.values())


def test_constants_are_those_of_the_formats():
    from shared.kernels.fp8 import triton_coder

    def bits(number: float) -> int:
        return int(torch.tensor(number).view(torch.int32))

    for dtype, (_, _, largest, *others) in triton_coder._CONSTANTS.items():
        assert largest == LARGEST[dtype]
        assert others == [bits(LARGEST[dtype]), bits(_CLIPPED_ABOVE[dtype]), bits(_ZERO_BELOW[dtype])]


SOURCES = ("plain", "gated", "normed", "zero-centred")


@pytest.mark.parametrize("source", range(4), ids=SOURCES)
def test_kernels_compile_for_hopper(tmp_path, monkeypatch, source):
    """To machine code by the assembler in Triton's wheel, with a division that rounds as torch's."""
    from shared.kernels.fp8 import triton_coder

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    mantissa, bias, largest, largest_bits, clipped, zero = triton_coder._CONSTANTS[torch.float8_e4m3fn]
    given = {
        **{"MANTISSA": mantissa, "BIAS": bias, "LARGEST": largest, "LARGEST_BITS": largest_bits},
        **{"CLIPPED_BITS": clipped, "ZERO_BITS": zero, "TRANSPOSED": True, "RECORD": True, "POWER_OF_TWO": True},
        **{"OF_ROWS": False, "SQUARE": False, "TILE": 32, "ROWS": 4, "COLUMNS": 64, "SOURCE": source},
    }
    pointers = {"x": "*bf16", "second": "*bf16", "third": "*bf16"}
    pointers |= {"second": "*fp32"} if source > 1 else {}
    pointers |= {"codes": "*u8", "transposed": "*u8", "partial": "*i32"}
    pointers |= dict.fromkeys(("scale", "transposed_scale", "out"), "*fp32")
    for kernel in (triton_coder._row_amax, triton_coder._encode_tile, triton_coder._encode_block):
        compiled = compiled_for_hopper(kernel, given, pointers)
        assert compiled.asm["cubin"]
        assert "div.full" not in compiled.asm["ptx"]
        assert "div.approx" not in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bytes_on_a_gpu_are_torchs_on_a_cpu(triton_worker):
    from shared.kernels.fp8 import triton_coder

    found = triton_worker.every_code(triton_coder, "cuda") | triton_worker.compared(triton_coder, "cuda")
    assert not any(fields for case, fields in found.items() if not re.search(r" (-?inf|nan)( |$)", case)), found
