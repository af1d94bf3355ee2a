"""Groups of rows in FP8: to the bit those of a layer for each; and the call that a GPU gets, by torch's own rules for it."""

from __future__ import annotations

import pytest
import torch

from shared.kernels.fp8 import grouped_matmul
from shared.kernels.fp8.codes import E4M3
from shared.kernels.fp8.grouped_matmul import (
    gradient_obstacle,
    grouped_fp8_linear,
    obstacle,
    products_of_rows,
    products_over_rows,
    together_of_rows,
    together_over_rows,
)
from shared.kernels.fp8.matmul import Shards, fp8_linear
from shared.kernels.fp8.product import Quantized
from shared.kernels.fp8.quantize import quantize
from shared.kernels.fp8.tensor_state import LinearState
from tests.shared.kernels.fp8.examples import recipe

NAMES = ("tensorwise", "delayed", "rowwise", "blockwise")
ONE = Shards()
COUNTS = {"uneven, some empty": [3, 0, 7, 40], "no rows": [0, 0], "one group": [20]}
K, N = 144, 32


def given(counts: list[int]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Rows, weights and an incoming gradient, larger from group to group."""
    generator = torch.Generator().manual_seed(7)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).bfloat16()

    sizes = torch.arange(1, len(counts) + 1).repeat_interleave(torch.tensor(counts))[:, None]
    weights = [normal(N, K).mul_(index + 1).requires_grad_() for index in range(len(counts))]
    return (normal(sum(counts), K) * sizes).requires_grad_(), weights, normal(sum(counts), N) * sizes


def loop(x, weights, counts, states, shards) -> torch.Tensor:
    parts = zip(x.split(counts.tolist()), weights, states, strict=True)
    return torch.cat([fp8_linear(part, weight, state, shards) for part, weight, state in parts])


def all_of(function, counts: list[int], states: list[LinearState]) -> list[torch.Tensor]:
    """The output, the gradients of rows and weights, and what the layers recorded."""
    x, weights, gradient = given(counts)
    y = function(x, weights, torch.tensor(counts), states, ONE)
    found = [y, *torch.autograd.grad(y, (x, *weights), gradient)]
    return found + [part for state in states for tensor in state.tensors.values() for part in tensor.take() or ()]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_group_is_a_layer_of_its_own(name, counts):
    ours, theirs = (
        all_of(function, counts, [LinearState(recipe(name)) for _ in counts]) for function in (grouped_fp8_linear, loop)
    )
    assert len(ours) == len(theirs) == 2 + len(counts) * (1 + 3 * 2)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_group_out_of_fp8_is_bf16_and_the_others_are_not():
    counts, found = COUNTS["uneven, some empty"], []
    for function in (grouped_fp8_linear, loop):
        states = [LinearState(recipe("rowwise")) for _ in counts]
        states[2].tensors["gradients"].scaling = "bf16"
        found.append(all_of(function, counts, states))
    assert len(found[0]) == 2 + len(counts) + 3 * 3 * 2  # nothing is recorded of the third
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_frozen_weights_and_validation():
    counts = COUNTS["uneven, some empty"]
    x, weights, gradient = given(counts)
    states = [LinearState(recipe("rowwise")) for _ in counts]
    frozen = [weight.detach() for weight in weights]
    grouped_fp8_linear(x, frozen, torch.tensor(counts), states, ONE).backward(gradient)
    assert x.grad is not None
    assert all(tensor.take() for state in states for tensor in state.tensors.values())
    with torch.no_grad():
        grouped_fp8_linear(x, weights, torch.tensor(counts), states, ONE)
    assert not any(tensor.take() for state in states for tensor in state.tensors.values())


def quantised(name: str, counts: list[int], *, over_rows: bool) -> tuple[list[Quantized], list[Quantized]]:
    """Operands of products of rows, or of products that sum over rows; all in E4M3."""
    x, weights, gradient = given(counts)
    pairs = []
    for part, weight, of in zip(x.split(counts), weights, gradient.split(counts), strict=True):
        state = LinearState(recipe(name, format="e4m3"))
        first, turned = quantize(part.detach(), state, "activations", ((), ()), record=False, transposed=True)
        other = quantize(of.t(), state, "gradients", ((), ()), record=False)[0]
        pairs.append(
            (other, turned) if over_rows else (first, quantize(weight, state, "weights", ((), ()), record=False)[0])
        )
    return [left for left, _ in pairs], [right for _, right in pairs]


def reference(a, b, scale_a, scale_b, offs, out_dtype) -> torch.Tensor:
    """`torch._scaled_grouped_mm` as torch documents its operands, in float64."""
    starts, ends = [0, *offs.tolist()[:-1]], offs.tolist()
    groups = list(zip(starts, ends, strict=True))
    if b.dim() == 3:
        assert (scale_a.shape, scale_b.shape) == ((len(a),), (len(b), b.shape[2]))
        parts = [
            (a[start:end].double() * scale_a[start:end, None]) @ (b[index].double() * scale_b[index])
            for index, (start, end) in enumerate(groups)
        ]
        return torch.cat(parts).to(out_dtype)
    assert (scale_a.shape, scale_b.shape) == ((len(a) * len(offs),), (b.shape[1] * len(offs),))
    of_a, of_b = scale_a.view(len(offs), -1, 1), scale_b.view(len(offs), 1, -1)
    parts = [
        (a[:, start:end].double() * of_a[index]) @ (b[start:end].double() * of_b[index])
        for index, (start, end) in enumerate(groups)
    ]
    return torch.stack(parts).to(out_dtype)


@pytest.mark.parametrize("counts", [[3, 0, 7, 40], [16, 32]], ids=str)
@pytest.mark.parametrize("name", ["tensorwise", "rowwise"])
def test_one_product_has_the_operands_of_all_groups(name, counts, monkeypatch):
    """Codes, scales and ends lie where torch's product looks for them: computed by its definition, the results are the loop's."""
    calls: list[tuple] = []

    def watched(a, b, scale_a, scale_b, *, offs, out_dtype):
        calls.append((a, b, scale_a, scale_b, offs))
        return reference(a, b, scale_a, scale_b, offs, out_dtype)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", watched)
    for over_rows, together, apart in (
        (False, together_of_rows, products_of_rows),
        (True, together_over_rows, lambda *given: torch.stack(list(products_over_rows(*given)))),
    ):
        operands = quantised(name, counts, over_rows=over_rows)
        found, wanted = together(*operands), apart(*operands, torch.bfloat16)
        assert found.shape == wanted.shape
        # fp32 sums beside float64, both rounded to bf16.
        assert (found.double() - wanted.double()).abs().max() <= 2**-8 * wanted.double().abs().max()
        if over_rows:
            assert all(not each.any() for each, count in zip(found, counts, strict=True) if not count)
            assert not any(end % 16 for end in calls[-1][4].tolist())
    monkeypatch.undo()
    # torch's own checks of dtypes, strides, alignment and shapes.
    for (a, b, scale_a, scale_b, offs), shape in zip(calls, [(sum(counts), N), (len(counts), N, K)], strict=True):
        given_ = [each.to("meta") for each in (a, b, scale_a, scale_b)]
        y = torch._scaled_grouped_mm(*given_, offs=offs.to("meta"), out_dtype=torch.bfloat16)
        assert (y.shape, y.dtype) == (shape, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() not in grouped_matmul._CAPABILITIES,
    reason="needs a GPU of compute capability 9.0 or 10.0",
)
@pytest.mark.parametrize("name", ["tensorwise", "rowwise"])
def test_one_product_on_a_gpu_is_the_loops(name):
    for over_rows, together, apart in (
        (False, together_of_rows, products_of_rows),
        (True, together_over_rows, products_over_rows),
    ):
        operands = quantised(name, [3, 0, 7, 40], over_rows=over_rows)
        on_gpu = [[Quantized(codes=each.codes.cuda(), scale=each.scale.cuda()) for each in side] for side in operands]
        wanted = apart(*operands, torch.bfloat16)
        found, wanted = (
            together(*on_gpu).cpu(),
            wanted if isinstance(wanted, torch.Tensor) else torch.stack(list(wanted)),
        )
        assert (found.float() - wanted.float()).norm() < 4e-3 * wanted.float().norm()


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "fp8_format", "sizes", "device", "capability", "words"),
    [
        ("blockwise", "e4m3", (16, 24), CPU, None, None),
        ("rowwise", "e4m3", (16, 32), CUDA, (9, 0), None),
        ("tensorwise", "e4m3", (16, 32), CUDA, (10, 0), None),
        ("blockwise", "e4m3", (16, 32), CUDA, (9, 0), "scales of blocks"),
        ("rowwise", "e4m3", (16, 24), CUDA, (9, 0), "24 is no multiple of 16"),
        ("rowwise", "e4m3", (16, 32), CUDA, (8, 9), "compute capability 9.0 and 10.0 only"),
        ("delayed", "hybrid", (16, 32), CUDA, (9, 0), None),  # in the forward pass
    ],
)
def test_what_stands_against_one_product(name, fp8_format, sizes, device, capability, words):
    found = obstacle(recipe(name, format=fp8_format), sizes, device, capability)
    assert found is None if words is None else words in found


def test_gradients_in_e5m2_are_not_grouped_on_a_gpu():
    assert "--fp8-format e4m3" in gradient_obstacle(recipe("delayed"), CUDA)
    assert gradient_obstacle(recipe("delayed", format="e4m3"), CUDA) is None
    assert gradient_obstacle(recipe("delayed"), CPU) is None


def test_torch_groups_no_e5m2():
    """So that `obstacle` refuses nothing that torch can do by now."""
    a, b = (
        torch.empty(32, 16, device="meta", dtype=torch.float8_e5m2),
        torch.empty(2, 32, 16, device="meta", dtype=E4M3),
    )
    scales = torch.empty(32, device="meta"), torch.empty(2, 32, device="meta")
    ends = torch.empty(2, device="meta", dtype=torch.int32)
    with pytest.raises(RuntimeError, match="E4M3"):
        torch._scaled_grouped_mm(a, b.transpose(-2, -1), *scales, offs=ends, out_dtype=torch.bfloat16)
