"""Grouped GEMM against a loop over groups in float64, and to the bit against the loop in the same precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shared.kernels.grouped import group_rows, grouped_linear, obstacle, stacked

K, N = 16, 24
COUNTS = {
    "uneven, some empty": [3, 0, 7, 1, 0, 5],
    "all in one": [0, 0, 11, 0, 0, 0],
    "no rows": [0, 0, 0, 0, 0, 0],
    "one group": [4],
}
# Of the largest value: rounding of the inputs' products and of the result. bf16 has 8 bits.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def given(counts: list[int], dtype: torch.dtype, device: str = "cpu"):
    """Rows, weights (each a tensor of its own) and an incoming gradient."""
    torch.manual_seed(len(counts))
    x = torch.randn(sum(counts), K, device=device).to(dtype).requires_grad_()
    weights = [torch.randn(N, K, device=device).to(dtype).requires_grad_() for _ in counts]
    return x, weights, torch.randn(sum(counts), N, device=device).to(dtype)


def loop(x: torch.Tensor, weights: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
    return torch.cat([functional.linear(rows, weight) for rows, weight in zip(x.split(counts), weights, strict=True)])


def all_of(function, x, weights, counts, gradient) -> list[torch.Tensor]:
    """The output, and the gradients of rows and weights."""
    y = function(x, weights, counts)
    return [y, *torch.autograd.grad(y, [x, *weights], gradient)]


def near(found: list[torch.Tensor], wanted: list[torch.Tensor], dtype: torch.dtype) -> bool:
    largest = max((float(each.abs().max()) for each in wanted if each.numel()), default=1.0)
    return all(
        (ours.double().cpu() - theirs).abs().max() <= TOLERANCE[dtype] * largest
        for ours, theirs in zip(found, wanted, strict=True)
        if theirs.numel()
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_group_has_its_product(counts, dtype):
    x, weights, gradient = given(counts, dtype)
    found = all_of(grouped_linear, x, weights, torch.tensor(counts), gradient)
    doubles = [each.detach().double().requires_grad_() for each in (x, *weights)]
    assert near(found, all_of(loop, doubles[0], doubles[1:], counts, gradient.double()), dtype)
    same = all_of(loop, x, weights, counts, gradient)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, same, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_group_has_its_product_on_a_gpu(counts):
    x, weights, gradient = given(counts, torch.bfloat16, "cuda")
    found = all_of(grouped_linear, x, weights, torch.tensor(counts), gradient)
    doubles = [each.detach().double().cpu().requires_grad_() for each in (x, *weights)]
    assert near(found, all_of(loop, doubles[0], doubles[1:], counts, gradient.double().cpu()), torch.bfloat16)


def test_the_gradient_of_a_sum():
    """It is one number, expanded."""
    counts = COUNTS["uneven, some empty"]
    x, weights, _ = given(counts, torch.float32)
    grouped_linear(x, weights, torch.tensor(counts)).sum().backward()
    for weight, count, rows in zip(weights, counts, x.split(counts), strict=True):
        assert torch.equal(weight.grad, torch.ones(N, count) @ rows)


def test_frozen_operands_have_no_gradient():
    counts = torch.tensor([2, 3])
    x, weights, _ = given(counts.tolist(), torch.float32)
    grouped_linear(x.detach(), weights, counts).sum().backward()
    assert x.grad is None
    assert all(weight.grad is not None for weight in weights)
    frozen = [weight.detach() for weight in weights]
    grouped_linear(x, frozen, counts).sum().backward()
    assert x.grad is not None


def test_weights_that_lie_in_one_tensor_are_not_copied():
    buffer = torch.randn(5, 100)
    apart = [row[: 4 * 8].view(4, 8) for row in buffer]
    for weights in (list(torch.randn(3, 4, 8)), apart, apart[::2], apart[3:4]):
        found = stacked(weights)
        assert torch.equal(found, torch.stack(weights))
        assert found.data_ptr() == weights[0].data_ptr()


@pytest.mark.parametrize(
    "chosen", [[2, 1, 0], [0, 1, 3], [0, 0, 0]], ids=["backwards", "unevenly spaced", "one three times"]
)
def test_other_weights_are_copied(chosen):
    buffer = torch.randn(5, 4, 8)
    weights = [buffer[index] for index in chosen]
    found = stacked(weights)
    assert torch.equal(found, buffer[chosen])
    assert found.data_ptr() != weights[0].data_ptr()


def test_weights_of_different_tensors_and_turned_ones_are_copied():
    one, two = torch.randn(2, 4, 8).unbind()
    assert torch.equal(stacked([one, two.clone()]), torch.stack([one, two]))
    turned = [each.t() for each in torch.randn(2, 4, 8)]
    assert torch.equal(stacked(turned), torch.stack(turned))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_rows_of_groups(counts, dtype):
    values = torch.randn(len(counts), N).to(dtype).requires_grad_()
    rows = group_rows(values, torch.tensor(counts))
    assert torch.equal(rows, values.repeat_interleave(torch.tensor(counts), dim=0))
    gradient = torch.randn(sum(counts), N).to(dtype)
    wanted = torch.stack([part.double().sum(0) for part in gradient.split(counts)])
    assert near([*torch.autograd.grad(rows, values, gradient)], [wanted], dtype)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "sizes", "device", "capability", "words"),
    [
        (torch.float32, (16, 24), CPU, None, None),
        (torch.bfloat16, (16, 24), CPU, None, None),
        (torch.bfloat16, (16, 24), CUDA, (8, 0), None),
        (torch.bfloat16, (16, 24), CUDA, (9, 0), None),
        (torch.bfloat16, (16, 24), CUDA, (7, 5), "compute capability is below 8.0"),
        (torch.float32, (16, 24), CUDA, (9, 0), "bfloat16 only on GPUs, these are float32"),
        (torch.float64, (16, 24), CPU, None, "no groups of float64"),
        (torch.float32, (16, 22), CPU, None, "rows of 22 float32 numbers are no multiple of 16 bytes"),
        (torch.bfloat16, (12, 16), CUDA, (9, 0), "rows of 12 bfloat16 numbers"),
    ],
)
def test_what_stands_against_it(dtype, sizes, device, capability, words):
    found = obstacle(dtype, sizes, device, capability)
    assert found is None if words is None else words in found


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 16), (torch.float32, 22)])
def test_an_obstacle_is_an_error_of_torch(dtype, size):
    """So that `obstacle` refuses nothing that torch can do by now."""
    weights = list(torch.randn(2, size, size, dtype=dtype))
    with pytest.raises(RuntimeError):
        grouped_linear(torch.randn(4, size, dtype=dtype), weights, torch.tensor([2, 2]))
