"""Layers that compute SwiGLU or a norm as they quantise, against the layer of the bf16 matrix: to the bit, on a CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn import functional

from shared.kernels.fp8 import quantize
from shared.kernels.fp8.fused import fp8_gated_linear, fp8_normed_linear, fuses
from shared.kernels.fp8.fused_source import rms_norm
from shared.kernels.fp8.matmul import Shards, fp8_linear
from shared.kernels.fp8.tensor_state import LinearState
from shared.kernels.glu import gated_linear_unit
from tests.shared.kernels.fp8.examples import recipe

NAMES = ("tensorwise", "delayed", "rowwise", "blockwise")
ONE = Shards()
TOKENS, INPUTS, OUTPUTS = 40, 144, 32


def given(width: int = INPUTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is read, a norm's weight, a layer's, and a gradient; as `[sequence, batch, ..]`."""
    generator = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    x, norm, weight = normal(TOKENS // 2, 2, width), normal(INPUTS), normal(OUTPUTS, INPUTS)
    return x.requires_grad_(), norm.requires_grad_(), weight.requires_grad_(), normal(TOKENS // 2, 2, OUTPUTS)


def recorded(state: LinearState) -> list:
    return [[part.tolist() for part in tensor.take()] for tensor in state.tensors.values()]


def state_of(name: str, *, history: bool = False) -> LinearState:
    state = LinearState(recipe(name, amax_history=1))
    for tensor in state.tensors.values() if history else ():
        tensor.history.restore([2.0])  # some are clipped
    return state


@pytest.mark.parametrize("name", NAMES)
def test_swiglu_and_layer_are_to_the_bit_those_apart(name):
    states, _, weight, g = given(2 * INPUTS)
    found, wanted = (state_of(name, history=name == "delayed") for _ in range(2))
    ours = fp8_gated_linear(states, weight, found, ONE)
    theirs = fp8_linear(gated_linear_unit(states, functional.silu), weight, wanted, ONE)
    assert torch.equal(ours, theirs)
    pairs = (torch.autograd.grad(y, (states, weight), g) for y in (ours, theirs))
    assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))
    assert recorded(found) == (counts := recorded(wanted))
    assert (counts[0][1][0] > 0) == (name == "delayed")


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_norm_and_layer_are_to_the_bit_those_apart(name, zero_centered):
    x, norm, weight, g = given()
    found, wanted = state_of(name), state_of(name)
    options = {"epsilon": 1e-5, "zero_centered": zero_centered}
    ours = fp8_normed_linear(x, norm, weight, found, ONE, **options)
    theirs = fp8_linear(rms_norm(x, norm, 1e-5, zero_centered=zero_centered), weight, wanted, ONE)
    assert torch.equal(ours, theirs)
    pairs = (torch.autograd.grad(y, (x, norm, weight), g) for y in (ours, theirs))
    assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))
    assert recorded(found) == recorded(wanted)


def kept(work) -> list[torch.Tensor]:
    """What is saved for the backward pass, each storage once."""
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return list(saved.values())


def test_no_output_of_silu_and_no_fp32_copy_is_kept():
    states, _, weight, _ = given(2 * INPUTS)
    x, norm, _, _ = given()
    for read, work in (
        (states, lambda: fp8_gated_linear(states, weight, state_of("tensorwise"), ONE)),
        (x, lambda: fp8_normed_linear(x, norm, weight, state_of("tensorwise"), ONE, epsilon=0.0, zero_centered=False)),
    ):
        sizes = {(each.shape.numel(), each.element_size()) for each in kept(work)}
        assert (read.numel(), 2) in sizes
        assert (TOKENS * INPUTS, 1) in sizes  # codes
        large = {size for size in sizes if size[0] >= TOKENS * INPUTS} - {(weight.numel(), 2)}
        assert large == {(read.numel(), 2), (TOKENS * INPUTS, 1)}


def test_out_of_fp8_it_is_bf16():
    states, _, weight, _ = given(2 * INPUTS)
    x, norm, _, _ = given()
    state = state_of("tensorwise")
    state.tensors["weights"].scaling = "bf16"
    plain = functional.linear(gated_linear_unit(states, functional.silu), weight)
    assert torch.equal(fp8_gated_linear(states, weight, state, ONE), plain)
    found = fp8_normed_linear(x, norm, weight, state, ONE, epsilon=1e-5, zero_centered=True)
    assert torch.equal(found, functional.linear(rms_norm(x, norm, 1e-5, zero_centered=True), weight))


def test_frozen_weights_have_no_gradient():
    states, _, weight, g = given(2 * INPUTS)
    x, norm, _, _ = given()
    frozen = weight.detach()
    fp8_gated_linear(states, frozen, state_of("rowwise"), ONE).backward(g)
    fp8_normed_linear(x.detach(), norm, frozen, state_of("rowwise"), ONE, epsilon=1e-5, zero_centered=False).backward(g)
    assert states.grad is not None
    assert norm.grad is not None
    fp8_gated_linear(states.detach(), weight, state_of("rowwise"), ONE).backward(g)
    assert weight.grad is not None


def test_it_is_done_in_bf16_on_a_gpu_with_triton(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert fuses(cuda, torch.bfloat16)
    assert not fuses(cuda, torch.float32)
    assert not fuses(cpu, torch.bfloat16)
    quantize._announce_torch.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not fuses(cuda, torch.bfloat16)
