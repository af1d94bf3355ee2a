from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.mlp import MLP

from shared.kernels.glu import gated_linear_unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "clamp", "offset"),
    [
        (torch.nn.functional.silu, None, 0.0),
        (torch.nn.functional.silu, 0.7, 1.0),
        (torch.nn.functional.silu, None, 1.0),
        (torch.nn.functional.gelu, None, 0.0),
    ],
    ids=["swiglu", "gpt_oss", "offset", "geglu"],
)
def test_output_and_gradient_are_megatrons_to_the_bit(activation, clamp, offset, dtype):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, 3, 50, generator=generator).to(dtype)
    gradient = torch.randn(7, 3, 25, generator=generator).to(dtype)
    config = SimpleNamespace(
        use_te_activation_func=False,
        bias_activation_fusion=False,
        gated_linear_unit=True,
        activation_func=activation,
        activation_func_clamp_value=clamp,
        glu_linear_offset=offset,
    )

    class Linear(torch.nn.Module):
        def forward(self, x):
            return x, None

    def megatron(x):
        made = SimpleNamespace(config=config, activation_func=activation, linear_fc1=Linear(), linear_fc2=Linear())
        return MLP.forward(made, x)[0]

    found = []
    for unit in (megatron, lambda x: gated_linear_unit(x, activation, clamp=clamp, offset=offset)):
        leaf = states.clone().requires_grad_()
        out = unit(leaf)
        out.backward(gradient)
        found.append((out.detach(), leaf.grad))
    (theirs, of_theirs), (ours, of_ours) = found
    assert torch.equal(ours, theirs)
    assert torch.equal(of_ours, of_theirs)
    assert of_ours.abs().sum() > 0


def test_swiglu_gradient_is_that_of_finite_differences():
    states = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gated_linear_unit(x, torch.nn.functional.silu), states)
