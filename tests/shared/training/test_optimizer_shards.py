"""Ranges of weights as boxes, and views without copies. Whole states at every layout: test_state.py."""

import math

import pytest
import torch

from shared.training.optimizer_shards import boxes, without_copy


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 6), (4, 5), (3, 1, 4), (2, 3, 4)])
def test_boxes_are_the_range_in_order(shape):
    """Every range of every shape."""
    whole = torch.arange(math.prod(shape)).view(shape)
    for start in range(whole.numel() + 1):
        for end in range(start, whole.numel() + 1):
            found = list(boxes(shape, start, end))
            parts = [
                whole[tuple(slice(first, first + length) for first, length in zip(offset, size, strict=True))]
                for offset, size in found
            ]
            assert [part.shape for part in parts] == [size for _, size in found]
            assert [int(x) for part in parts for x in part.reshape(-1)] == list(range(start, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_view_gets_a_storage_of_its_size_over_the_same_memory(dtype):
    whole = torch.arange(12).to(dtype)
    view = whole[2:8].view(2, 3)
    ours = without_copy(view)
    assert torch.equal(ours, view)
    assert (ours.shape, ours.dtype, ours.data_ptr()) == (view.shape, dtype, view.data_ptr())
    assert ours.untyped_storage().nbytes() == view.numel() * view.itemsize < whole.untyped_storage().nbytes()
    whole[2] = 7
    assert ours[0, 0] == 7


def test_other_tensors_stay_as_they_are():
    across = torch.arange(6.0).view(2, 3).t()
    assert without_copy(across).stride() == across.stride()
    assert without_copy(torch.empty(0, 3)).shape == (0, 3)
    assert without_copy(torch.empty(2, device="meta")).device.type == "meta"
    assert not without_copy(torch.ones(2, requires_grad=True)).requires_grad
