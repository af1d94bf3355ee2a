"""Output and gradients of a linear layer against float64 products of the numbers that the codes stand for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shared.kernels.fp8 import matmul
from shared.kernels.fp8.blockwise import BLOCK
from shared.kernels.fp8.codes import E4M3, E5M2, LARGEST
from shared.kernels.fp8.matmul import Shards, fp8_linear
from shared.kernels.fp8.recipes import KINDS
from shared.kernels.fp8.tensor_state import LinearState
from tests.shared.kernels.fp8.examples import recipe

NAMES = ("tensorwise", "delayed", "rowwise", "blockwise")
ONE = Shards()


def operands(tokens: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Input, weight and gradient, with rows and columns of several sizes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        found = torch.randn(shape, generator=generator)
        return found * torch.rand(shape[0], 1, generator=generator).mul(6).exp() / 100

    x, weight = normal(tokens, inputs).to(dtype), normal(outputs, inputs).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), normal(tokens, outputs).to(dtype)


def rounded(x: torch.Tensor, dtype: torch.dtype, name: str, rows: int, two: bool) -> torch.Tensor:
    """`x` in FP8 and back, float64, by a loop over what shares a scale: of `rows` rows in blocks."""
    result = torch.empty(x.shape, dtype=torch.float64)
    high, wide = {"tensorwise": x.shape, "delayed": x.shape, "rowwise": (1, x.shape[1])}.get(name, (rows, BLOCK))
    for top in range(0, x.shape[0], max(high, 1)):
        for left in range(0, x.shape[1], wide):
            part = x[top : top + high, left : left + wide].detach().float()
            scale = part.abs().max() / LARGEST[dtype] if part.abs().max() > 0 else torch.tensor(1.0)
            if two:
                scale = torch.tensor(2.0 ** torch.ceil(torch.log2(scale.double())).item())
            codes = (part / scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
            result[top : top + high, left : left + wide] = codes.double() * scale.double()
    return result


@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(33, 300, 130), (5, 16, 24), (1, 129, 1)], ids=str)
def test_the_three_products_are_those_of_the_codes(shape, name, fp8_format):
    x, weight, g = operands(*shape)
    used = recipe(name, format=fp8_format)
    y = fp8_linear(x, weight, LinearState(used), ONE)
    y.backward(g)
    gradient = E5M2 if fp8_format == "hybrid" else E4M3
    two = used.power_of_two_scales

    def q(tensor: torch.Tensor, dtype: torch.dtype = E4M3, rows: int = 1) -> torch.Tensor:
        return rounded(tensor, dtype, name, rows, two)

    wanted = {
        "y": (y, q(x), q(weight, rows=BLOCK).t()),
        "dx": (x.grad, q(g, gradient), q(weight.t(), rows=BLOCK).t()),
        "dW": (weight.grad, q(g.t(), gradient), q(x.t()).t()),
    }
    for what, (found, left, right) in wanted.items():
        # Sums in fp32, of at most 300 numbers.
        limit = 1e-6 * (left.abs() @ right.abs())
        assert ((found.double() - left @ right).abs() <= limit + 1e-30).all(), what


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_that_of_eight_bits(name):
    """Against the product without FP8: E4M3 rounds by 2^-4 at most, so that a sum of random signs is a few percent off."""
    x, weight, g = operands(256, 256, 256, torch.bfloat16)
    exact = functional.linear(x, weight)
    of_x, of_weight = torch.autograd.grad(exact, (x, weight), g)
    y = fp8_linear(x, weight, LinearState(recipe(name)), ONE)
    found = torch.autograd.grad(y, (x, weight), g)
    assert y.dtype == found[0].dtype == found[1].dtype == torch.bfloat16
    for ours, theirs in zip((y, *found), (exact, of_x, of_weight), strict=True):
        difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert 0.005 < difference < 0.08


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_for_the_backward_pass_is_a_byte_an_element(name):
    x, weight, _ = operands(256, 256, 128, torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fp8_linear(x, weight, LinearState(recipe(name)), ONE)
    own = [each for each in kept if each.data_ptr() != weight.data_ptr()]
    assert sum(each.nbytes for each in own if each.element_size() == 1) == x.numel()
    assert sum(each.nbytes for each in own if each.element_size() != 1) <= x.numel() / 16  # scales


def test_a_frozen_weight_keeps_nothing_of_the_input():
    x, weight, g = operands(16, 32, 16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = fp8_linear(x, weight.detach(), LinearState(recipe("tensorwise")), ONE)
    assert not any(each.element_size() == 1 for each in kept)
    y.backward(g)
    assert x.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens(name):
    x, weight, g = operands(0, 32, 16)
    state = LinearState(recipe(name))
    y = fp8_linear(x, weight, state, ONE)
    y.backward(g)
    assert y.shape == (0, 16)
    assert x.grad.shape == (0, 32)
    assert not weight.grad.any()
    amax, counts = state.tensors["activations"].take()
    assert (amax.item(), counts.tolist()) == (0.0, [0, 0, 0])


def end(state: LinearState) -> dict[str, tuple[float, list[int]]]:
    """End an update; what was recorded."""
    found = {}
    for kind in KINDS:
        taken = state.tensors[kind].take()
        if taken:
            found[kind] = (taken[0].item(), taken[1].tolist())
            state.tensors[kind].end_update(*[taken[0].item(), *taken[1].tolist()])
    return found


def test_a_delayed_scale_is_that_of_the_history():
    x, weight, g = operands(64, 64, 32)
    state = LinearState(recipe("delayed", amax_history=1))
    first = fp8_linear(x, weight, state, ONE)
    first.backward(g)
    assert torch.equal(first, fp8_linear(x, weight, LinearState(recipe("tensorwise")), ONE))  # no history yet
    recorded = end(state)
    largest = {"activations": x, "weights": weight, "gradients": g}
    assert {kind: amax for kind, (amax, _) in recorded.items()} == {k: v.abs().max().item() for k, v in largest.items()}
    # Half the size, scaled as before: all codes are those of the first update, an exponent lower.
    with torch.no_grad():
        halved = fp8_linear(x / 2, weight, state, ONE)
    scale = rounded_by(x / 2, x.abs().max() / 448)
    exact = scale @ rounded(weight, E4M3, "tensorwise", 1, False).t()
    assert (halved.double() - exact).abs().max() <= 1e-6 * exact.abs().max()
    # Ten times the size: clipped, counted, and known from the next update on.
    fp8_linear(x * 10, weight, state, ONE).backward(g)
    recorded = end(state)
    assert recorded["activations"][1][0] == int(((x * 10 / (x.abs().max() / 448)).abs() >= 464).sum()) > 0
    assert state.tensors["activations"].history.highest == pytest.approx(10 * x.abs().max().item())
    assert recorded["weights"][1][0] == recorded["gradients"][1][0] == 0


def rounded_by(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.detach() / scale).to(E4M3).double() * scale.double()


def test_validation_and_recomputation_record_nothing_twice():
    from torch.utils.checkpoint import checkpoint

    x, weight, g = operands(32, 32, 32)
    plain, recomputed, looked_at = (LinearState(recipe("delayed")) for _ in range(3))
    fp8_linear(x, weight, plain, ONE).backward(g)
    checkpoint(lambda given: fp8_linear(given, weight, recomputed, ONE), x, use_reentrant=True).backward(g)
    with torch.no_grad():
        fp8_linear(x * 100, weight, looked_at, ONE)
    assert end(recomputed) == end(plain)
    assert end(looked_at) == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_recorded_as_infinity(name, wrong):
    x, weight, g = operands(16, 32, 16)
    state = LinearState(recipe(name))
    g[3, 2] = wrong
    fp8_linear(x, weight, state, ONE).backward(g)
    assert {kind: state.tensors[kind].take()[0].item() == torch.inf for kind in KINDS} == {
        "activations": False,
        "weights": False,
        "gradients": True,
    }
    with torch.no_grad():
        x[1, 1] = wrong
    fp8_linear(x, weight, state, ONE)
    assert state.tensors["activations"].take()[0] == torch.inf


@pytest.mark.parametrize("planting", range(20))
def test_a_planted_overflow_is_caught_within_one_update(planting):
    """In a tensor and at a size of the planting's own; the next update has a scale that fits."""
    generator = torch.Generator().manual_seed(planting)
    x, weight, g = (each.detach() for each in operands(64, 64, 64, seed=planting))
    kind = KINDS[planting % 3]
    state = LinearState(recipe("delayed", amax_history=3))

    def update(x: torch.Tensor, weight: torch.Tensor, g: torch.Tensor) -> None:
        fp8_linear(x.requires_grad_(), weight.requires_grad_(), state, ONE).backward(g)
        end(state)

    for _ in range(3):
        update(x.clone(), weight.clone(), g)
    assert [state.tensors[each].scaling for each in KINDS] == ["delayed"] * 3
    given = {"activations": x.clone(), "weights": weight.clone(), "gradients": g.clone()}
    column = int(torch.randint(64, (), generator=generator))
    given[kind][:, column] *= 10.0 ** (3 + planting % 4)
    update(*given.values())
    assert state.tensors[kind].scaling == "current"
    assert [each for each in KINDS if state.tensors[each].scaling != "delayed"] == [kind]
    given[kind] = given[kind].detach() * 100  # no history would know it
    before = state.tensors[kind].history.values
    fp8_linear(given["activations"].requires_grad_(), given["weights"].requires_grad_(), state, ONE).backward(
        given["gradients"]
    )
    assert state.tensors[kind].take()[1][0] == 0
    assert state.tensors[kind].history.values == before


def test_out_of_fp8_a_layer_is_a_plain_one():
    x, weight, g = operands(16, 32, 16)
    state = LinearState(recipe("tensorwise"))
    state.tensors["gradients"].scaling = "bf16"
    y = fp8_linear(x, weight, state, ONE)
    assert torch.equal(y, functional.linear(x, weight))
    y.backward(g)
    assert torch.equal(x.grad, g @ weight)
    assert end(state) == {}


def test_an_outlier_channel_costs_tensors_more_than_blocks():
    """arXiv:2412.19437, section 3.3: the reason for blocks."""
    x, weight, _ = (each.detach() for each in operands(128, 2048, 256, torch.bfloat16))
    weight[:, 7] *= 1e5
    x[:, 7] /= 1e5
    exact = x.double() @ weight.double().t()
    error = {}
    for name in NAMES:
        y = fp8_linear(x, weight, LinearState(recipe(name)), ONE)
        error[name] = float((y.double() - exact).norm() / exact.norm())
    assert error["tensorwise"] > 2 * error["blockwise"]


def test_ranks_of_a_sequence_keep_their_part(monkeypatch):
    """Codes are cut before they are kept and gathered as bytes before dW; here by a group of one."""

    class Two:
        """A group whose second rank has what the first has."""

        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 0

    def gather(out: torch.Tensor, part: torch.Tensor, group: Two) -> None:
        assert part.dtype == torch.uint8
        out.copy_(torch.cat([part, part]))

    monkeypatch.setattr(matmul, "all_gather_into_tensor", gather)
    for name in NAMES:
        x, weight, g = operands(32, 48, 16)
        twice = torch.cat([x.detach()[:16]] * 2).requires_grad_()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):  # noqa: B023
            y = fp8_linear(twice, weight, LinearState(recipe(name)), Shards(sequence=Two()))
        assert sum(each.numel() for each in kept if each.element_size() == 1) == 16 * 48
        y.backward(g)
        found = weight.grad.clone()
        weight.grad = None
        fp8_linear(twice, weight, LinearState(recipe(name)), ONE).backward(g)
        assert torch.equal(found, weight.grad)
