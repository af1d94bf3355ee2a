"""Sources in Triton kernels: SiLU of every bf16 number, codes as torch's, gradients beside torch's and float64."""

from __future__ import annotations

import pytest
import torch

from tests.shared.kernels.fp8.examples import compiled_for_hopper

# Relative to the largest number. bf16 has 8 bits: the last one differs where the fp32 number lies near the middle of two.
LIMITS = {"up": 0.0, "gate": 2**-8, "x": 2**-8, "weight": 2**-8, "inverse": 2**-22}


def test_silu_of_every_number_is_torchs(interpreted):
    assert interpreted["gates"] == []


def test_codes_of_sources_are_torchs(interpreted):
    """Of SwiGLU and of norms, by rows and turned: amax, scales, codes both ways, counts."""
    found = {case: fields for case, fields in interpreted.items() if case.startswith("source")}
    assert len(found) == 4 * 3 * 2 * 2
    assert {case: fields for case, fields in found.items() if fields} == {}


def test_gradients_are_torchs_but_for_the_last_bit(interpreted):
    found = interpreted["gradients"]
    assert {name.split()[0] for name in found} == set(LIMITS)
    assert {name: apart for name, apart in found.items() if apart > LIMITS[name.split()[0]]} == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_sources_are_torchs(triton_worker):
    from shared.kernels.fp8 import triton_coder

    assert triton_worker.every_gate(triton_coder, "cuda") == {"gates": []}
    found = triton_worker.gradients(triton_coder, "cuda")
    assert {name: apart for name, apart in found.items() if apart > max(LIMITS[name.split()[0]], 2**-8)} == {}


KERNELS = {
    "_inverse_rms": {"x": "*bf16", "out": "*fp32", "epsilon": "fp32"},
    "_gated_gradient": dict.fromkeys(("gate", "up", "gradient", "of_gate", "of_up"), "*bf16"),
    "_normed_gradient": {
        **dict.fromkeys(("x", "weight", "gradient", "of_x"), "*bf16"),
        **dict.fromkeys(("inverse", "of_weight"), "*fp32"),
    },
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_hopper(tmp_path, monkeypatch, name):
    from shared.kernels.fp8 import triton_source

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    given = {"ROWS": 4, "COLUMNS": 128, "ZERO_CENTERED": False}
    assert compiled_for_hopper(getattr(triton_source, name), given, KERNELS[name]).asm["cubin"]
