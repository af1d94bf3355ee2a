"""Sinks over flash kernels that know none: torch's own for CPU here. Over the others: `test_every_back_end`."""

import torch

from shared.kernels.attention import sinks
from shared.kernels.attention.variable_length import pack
from tests.references.attention import call


class TorchsForCpu:
    """torch's flash kernel for CPU, of one row of one segment."""

    def forward(self, q, k, v):
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, True)[:2]
        return out[0].transpose(0, 1), lse[0]

    def backward(self, grad, q, k, v, out, lse):
        rows = (x.transpose(0, 1)[None] for x in (grad, q, k, v, out))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*rows, lse[None], 0.0, True)
        return tuple(x[0].transpose(0, 1) for x in found)


def test_outputs_and_all_gradients_are_the_formulas():
    generator = torch.Generator().manual_seed(1)
    q, k, v, weights = (torch.randn(1, 4, 64, 16, generator=generator, dtype=torch.float64) for _ in range(4))
    sink = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]

    scores = q @ k.transpose(-1, -2) / 4
    scores = scores.masked_fill(~torch.ones(64, 64).tril().bool(), -torch.inf)
    scores = torch.cat([scores, sink.view(1, 4, 1, 1).expand(1, 4, 64, 1)], -1)
    expected = scores.softmax(-1)[..., :64] @ v

    packed = pack(call(q, k, v, None))
    found = packed.unpack(sinks.attend(packed, sink, TorchsForCpu()))
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    ours = torch.autograd.grad((found * weights).sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_a_sink_far_below_the_scores_changes_nothing():
    q, k, v = (torch.randn(1, 4, 32, 16, dtype=torch.float64) for _ in range(3))
    packed = pack(call(q, k, v, None))
    kernel = TorchsForCpu()
    plain = kernel.forward(packed.q_THW, packed.k_TGW, packed.v_TGW)[0]
    found = sinks.attend(packed, torch.full((4,), -1e4, dtype=torch.float64), kernel)
    torch.testing.assert_close(found, plain, atol=0, rtol=0)
