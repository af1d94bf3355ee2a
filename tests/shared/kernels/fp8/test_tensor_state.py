"""The state of a linear layer: encoded and decoded, and the guard's steps."""

from __future__ import annotations

import random

import pytest
import torch

from shared.kernels.fp8.recipes import KINDS
from shared.kernels.fp8.tensor_state import CLIPPED_LIMIT, UNDERFLOW_LIMIT, LinearState
from tests.shared.kernels.fp8.examples import recipe


def filled(name: str, updates: int, seed: int = 0) -> LinearState:
    """After updates with random amax."""
    state, source = LinearState(recipe(name, amax_history=8)), random.Random(seed)
    for _ in range(updates):
        for kind in KINDS:
            state.tensors[kind].end_update(torch.tensor(source.expovariate(1.0)).item(), 0, 0, 100)
    return state


@pytest.mark.parametrize("updates", [1, 5, 20])
def test_a_state_comes_back_to_the_digit(updates):
    for seed in range(20):
        state = filled("delayed", updates, seed)
        state.tensors[KINDS[seed % 3]].scaling = ("delayed", "current", "bf16")[seed % 3]
        encoded = state.encode()
        other = LinearState(state.recipe)
        other.decode(encoded)
        for kind in KINDS:
            one, two = state.tensors[kind], other.tensors[kind]
            assert one.history.values == two.history.values
            assert len(one.history.values) == min(updates, 8)
            assert (one.history.highest, one.scaling) == (two.history.highest, two.scaling)
        assert torch.equal(other.encode(), encoded)
        assert encoded.dtype == torch.float32


def test_there_is_no_state_without_history_and_fallback():
    for name in ("tensorwise", "delayed", "rowwise", "blockwise"):
        assert LinearState(recipe(name)).encode() is None
    state = filled("tensorwise", 3)
    assert state.encode() is None
    state.tensors["weights"].scaling = "bf16"
    other = LinearState(recipe("rowwise"))
    other.decode(state.encode())
    assert other.in_bf16


def test_a_state_of_another_recipe():
    """Histories are for the delayed recipe only, fallbacks for all; a tensorwise run never had a delayed scale."""
    state = filled("delayed", 3)
    state.tensors["gradients"].scaling = "current"
    other = LinearState(recipe("tensorwise"))
    other.decode(state.encode())
    assert [other.tensors[kind].scaling for kind in KINDS] == ["current"] * 3
    assert other.encode() is None
    longer = LinearState(recipe("delayed", amax_history=2))
    longer.decode(state.encode())
    assert len(longer.tensors["weights"].history.values) == 2
    assert longer.tensors["gradients"].scaling == "current"


@pytest.mark.parametrize(
    "numbers", [[], [2.0] + [0.0] * 6, [1.0, 0, 0, 0, 1, 0, 0], [1.0, 0, 0, 0, 0, 0, 0, 3.0], [1.0]]
)
def test_what_is_no_state_is_refused(numbers):
    with pytest.raises(ValueError, match="no FP8 state"):
        LinearState(recipe("delayed")).decode(torch.tensor(numbers))


def test_the_guard_falls_back_step_by_step_and_stays():
    tensor = LinearState(recipe("delayed")).tensors["activations"]
    nonzero = 100_000
    allowed = int(CLIPPED_LIMIT * nonzero), int(UNDERFLOW_LIMIT * nonzero)
    assert tensor.end_update(1.0, *allowed, nonzero).fell_back is None
    assert tensor.end_update(1.0, allowed[0] + 1, 0, nonzero).fell_back == "current"
    assert tensor.end_update(1.0, 0, allowed[1], nonzero).fell_back is None
    assert tensor.end_update(1.0, 0, allowed[1] + 1, nonzero).fell_back == "bf16"
    assert tensor.end_update(1.0, nonzero, nonzero, nonzero).fell_back is None
    assert tensor.scaling == "bf16"


def test_a_late_scale_is_an_amax_above_the_history():
    tensor = LinearState(recipe("delayed", amax_history=2)).tensors["weights"]
    late = [tensor.end_update(amax, 0, 0, 10).late for amax in (1.0, 1.0, 2.0, 1.5, 1.5, 1.8, 0.0, 9.0)]
    assert late == [False, False, True, False, False, True, False, True]
    current = LinearState(recipe("tensorwise")).tensors["weights"]
    assert not any(current.end_update(amax, 0, 0, 10).late for amax in (1.0, 2.0, 3.0))


def test_micro_batches_of_an_update_are_added_up():
    tensor = LinearState(recipe("delayed")).tensors["weights"]
    assert tensor.take() is None
    tensor.record(torch.tensor(3.0), torch.tensor([1, 2, 3]))
    tensor.record(torch.tensor(2.0), torch.tensor([10, 20, 30]))
    amax, counts = tensor.take()
    assert (amax.item(), counts.tolist()) == (3.0, [11, 22, 33])
    tensor.record(torch.tensor(torch.nan), torch.zeros(3))
    tensor.record(torch.tensor(1.0), torch.zeros(3))
    assert tensor.take()[0] == torch.inf
    assert tensor.take() is None
