"""Attention by segments and blocks: what is in memory. Its numbers are tried in `test_every_back_end`."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared.kernels.attention import alibi, segments
from shared.kernels.attention.needs import Features
from tests.references.attention import call

SLOPES = alibi.slopes(2)
SINKS = torch.tensor([0.5, -1.0])
LENGTH, BLOCK = 1024, 64
FEATURES = {
    "causal": Features(),
    "window": Features(window=40),
    "wide window": Features(window=300),
    "ALiBi": Features(slopes_H=SLOPES),
    "rounded ALiBi": Features(slopes_H=SLOPES, rounded_alibi=0.3),
    "soft cap": Features(softcap=2.0),
    "sinks": Features(sinks_H=SINKS),
    "sinks in a window": Features(sinks_H=SINKS, window=40),
}


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return found


class OfTheRow(TorchDispatchMode):
    """How many elements of tensors as long as the row all operators returned together, views not."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not function.is_view and found.ndim == 4 and found.shape[2] == LENGTH:
            self.elements += found.numel()
        return found


def inputs(length, queries=None):
    generator = torch.Generator().manual_seed(1)
    shapes = (1, 2, queries or length, 4), (1, 1, length, 4), (1, 1, length, 4)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("rows", ["one segment", "packed", "later queries"])
def test_no_tensor_has_as_many_elements_as_a_mask_of_the_row(name, rows, monkeypatch):
    """Forward and backward. The largest are the scores of a block and two heads, an eighth of a mask, with a column of sinks."""
    monkeypatch.setattr(segments, "BLOCK", BLOCK)
    start = 300 if rows == "later queries" else 0
    packed = torch.arange(LENGTH)[None] // 200 if rows == "packed" else None
    given = inputs(LENGTH, LENGTH - start)
    with Largest() as largest:
        segments.attend(call(*given, packed, FEATURES[name])).sum().backward()
    assert all(x.grad is not None for x in given)
    assert largest.elements <= 2 * BLOCK * (LENGTH + 1) < LENGTH * LENGTH / 7


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_kept_for_the_backward_pass_grows_with_the_row(name, packed, monkeypatch):
    monkeypatch.setattr(segments, "BLOCK", BLOCK)

    def kept(length):
        sizes = {}
        rows = torch.arange(length)[None] // 100 if packed else None
        given = inputs(length)
        own = {x.untyped_storage().data_ptr() for x in given}

        def keep(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = segments.attend(call(*given, rows, FEATURES[name]))
        assert out.requires_grad
        return sum(sizes.values())

    sizes = [kept(length) for length in (600, 1200, 1800)]
    assert sizes[2] - sizes[1] <= 1.1 * (sizes[1] - sizes[0])


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        *((name, True) for name in ("causal", "sinks", "window")),
        *((name, False) for name in ("window", "wide window", "sinks in a window")),
    ],
)
def test_gradients_are_added_up_once_a_row(name, packed, monkeypatch):
    """Not as a tensor of the whole row for each segment and block: with 51 segments, or 26 blocks, that is as many rows."""
    monkeypatch.setattr(segments, "BLOCK", 40)
    given = inputs(LENGTH)
    rows = torch.arange(LENGTH)[None] // 20 if packed else None
    with OfTheRow() as made:
        segments.attend(call(*given, rows, FEATURES[name])).sum().backward()
    whole = sum(x.numel() for x in given)
    assert whole <= made.elements <= 4 * whole


def test_rows_with_the_same_borders_are_one_batch(monkeypatch):
    sizes = []
    within = segments._within_segment
    monkeypatch.setattr(
        segments, "_within_segment", lambda q, k, v, features: sizes.append(q.shape[:3:2]) or within(q, k, v, features)
    )
    q = torch.randn(2, 1, 6, 4)
    segments.attend(call(q, q, q, torch.tensor([[1, 1, 2, 2, 2, 2]] * 2), Features()))
    assert sizes == [(2, 2), (2, 4)]
    sizes.clear()
    segments.attend(call(q, q, q, torch.tensor([[1, 1, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2]]), Features()))
    assert sizes == [(1, 2), (1, 4), (1, 3), (1, 3)]
