"""Sources against the modules whose output they stand for, and against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shared.kernels.fp8 import torch_coder
from shared.kernels.fp8.fused_source import Gated, Normed, dense, rms_norm
from shared.kernels.glu import gated_linear_unit

EPSILON = 0.25  # beside mean squares of about 1


def gated(rows: int = 33, columns: int = 48) -> tuple[torch.Tensor, Gated]:
    states = torch.randn(rows, 2 * columns, generator=torch.Generator().manual_seed(1)).mul(3).bfloat16()
    gate, up = states.chunk(2, 1)
    return states, Gated(gate=gate, up=up)


def normed(zero_centered: bool) -> Normed:
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(size, generator=generator).bfloat16() for size in ((33, 48), (1, 48)))
    inverse = torch_coder.inverse_rms(x, EPSILON)
    return Normed(x=x, inverse=inverse, weight=weight, epsilon=EPSILON, zero_centered=zero_centered)


def test_swiglu_is_that_of_the_modules_and_of_the_formula():
    states, source = gated()
    assert torch.equal(source.dense(), gated_linear_unit(states, functional.silu))
    gate, up = source.gate.double(), source.up.double()
    exact = gate / (1 + torch.exp(-gate)) * up
    assert ((source.dense().double() - exact).abs() <= 2**-7 * exact.abs()).all()  # rounded twice to 8 bits


@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_norm_is_that_of_the_modules_and_of_the_formula(zero_centered):
    source = normed(zero_centered)
    found = source.dense()
    assert torch.equal(found, rms_norm(source.x, source.weight[0], EPSILON, zero_centered=zero_centered))
    x, weight = source.x.double(), source.weight.double() + zero_centered
    exact = weight * x / (x.square().mean(1, keepdim=True) + EPSILON).sqrt()
    assert ((found.double() - exact).abs() <= 2**-7 * exact.abs()).all()


@pytest.mark.parametrize("source", [gated()[1], normed(False), normed(True)], ids=["gated", "normed", "zero-centred"])
def test_a_turned_source_is_the_turned_matrix(source):
    assert torch.equal(source.t().dense(), source.dense().t())
    assert source.t().shape == source.dense().t().shape
    assert (len(source.t()), source.t().dtype, source.t().device) == (48, torch.bfloat16, source.dense().device)
    assert torch.equal(dense(source), source.dense())
    assert dense(found := source.dense()) is found
