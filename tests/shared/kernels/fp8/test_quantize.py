"""Which module computes codes on a device; what it computes is tested in test_matmul.py."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from shared.kernels.fp8 import quantize, torch_coder
from shared.kernels.fp8.tensor_state import LinearState
from tests.shared.kernels.fp8.examples import recipe

NAMES = ("tensorwise", "delayed", "rowwise", "blockwise")


def test_kernels_on_a_gpu_and_torch_elsewhere(monkeypatch, capsys):
    from shared.kernels.fp8 import triton_coder

    quantize._announce_torch.cache_clear()
    assert quantize.coder(torch.device("cpu")) is torch_coder
    assert quantize.coder(torch.device("cuda")) is triton_coder
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert quantize.coder(torch.device("cuda", 1)) is quantize.coder(torch.device("cuda")) is torch_coder
    (said,) = capsys.readouterr().err.splitlines()
    assert "Triton is not installed" in said


@pytest.mark.parametrize("kind", ["activations", "weights"])
@pytest.mark.parametrize("name", NAMES)
def test_the_codes_of_the_transpose_are_those_of_a_transposed_matrix(name, kind):
    x = torch.randn(150, 300, generator=torch.Generator().manual_seed(1))
    state = LinearState(recipe(name))
    first, second = quantize.quantize(x, state, kind, ((), ()), record=False, transposed=True)
    other, none = quantize.quantize(x.t().contiguous(), state, kind, ((), ()), record=False)
    assert none is None
    assert torch.equal(second.codes.view(torch.uint8), other.codes.view(torch.uint8))
    assert torch.equal(second.scale, other.scale)
    if kind == "weights":
        again = quantize.transposed_weight(x, first.scale, state, ((), ()))
        assert torch.equal(again.codes.view(torch.uint8), other.codes.view(torch.uint8))
        assert torch.equal(again.scale, other.scale)


@pytest.mark.parametrize("kind", ["activations", "weights"])
@pytest.mark.parametrize("name", NAMES)
def test_amax_and_counts_are_recorded_once_for_both_ways(name, kind):
    x = torch.randn(150, 300, generator=torch.Generator().manual_seed(1))
    state = LinearState(recipe(name))
    quantize.quantize(x, state, kind, ((), ()), record=True, transposed=True)
    amax, counts = state.tensors[kind].take()
    assert amax == x.abs().max()
    assert counts[2] == torch.count_nonzero(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_on_a_gpu_has_the_codes_of_one_on_a_cpu(name):
    from shared.kernels.fp8.matmul import Shards, fp8_linear

    generator = torch.Generator().manual_seed(2)
    x, weight, g = (torch.randn(size, generator=generator).bfloat16() for size in ((96, 256), (160, 256), (96, 160)))
    found = {}
    for device in ("cpu", "cuda"):
        state = LinearState(recipe(name))
        given, of = (each.to(device).requires_grad_() for each in (x, weight))
        y = fp8_linear(given, of, state, Shards())
        y.backward(g.to(device))
        recorded = [each.tolist() for tensor in state.tensors.values() for each in tensor.take()]
        found[device] = [each.cpu().float() for each in (y, given.grad, of.grad)], recorded
    assert found["cpu"][1] == found["cuda"][1]
    for ours, theirs in zip(found["cuda"][0], found["cpu"][0], strict=True):
        # Hopper's matrix units sum with 14 bits (arXiv:2412.19437, section 3.3.2); results are bf16.
        assert (ours - theirs).norm() < 4e-3 * theirs.norm()
