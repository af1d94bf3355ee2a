"""Attention by segments and windows against one query at a time in float64, and its gradients against a dense mask's."""

from functools import partial

import pytest
import torch

from shared.kernels.attention import eager, masks, sdpa
from shared.kernels.attention.segments import within_segments, within_window
from tests.references.attention import SEGMENTS, attention, inputs

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
CPU = torch.device("cpu")


@pytest.mark.parametrize("further", [{}, {"softcap": 1.5}, {"sinks": SINKS}])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 7])
@pytest.mark.parametrize("segments", [SEGMENTS, SEGMENTS[:1].expand(2, -1), torch.zeros_like(SEGMENTS)])
def test_it_is_attention(segments, window, further):
    q, k, v = inputs(2)
    allowed = masks.dense(segments)
    if window is not None:
        allowed &= masks.window(7, window, CPU)
    masked = partial(sdpa.attend, scale=0.3)
    if further:
        masked = partial(eager.attend, scale=0.3, softcap=further.get("softcap"), sinks_H=further.get("sinks"))
    found = within_segments(partial(blockwise, masked, window), q, k, v, segments)
    expected = attention(q, k, v, allowed[:, 0], 0.3, **further)
    tolerance = 1e-6 if further else 1e-12  # the eager softmax is in fp32
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def blockwise(masked, window, q, k, v):
    return masked(q, k, v, None) if window is None else within_window(masked, q, k, v, window)


@pytest.mark.parametrize("seed", range(20))
def test_gradients_are_those_of_a_dense_mask(seed):
    """Random rows: 1 to 60 tokens, segments of any length, windows of any size."""
    generator = torch.Generator().manual_seed(seed)
    length, batch, size = (int(torch.randint(1, end, (), generator=generator)) for end in (61, 4, 20))
    segments = torch.randint(0, 2, (batch, length), generator=generator).cumsum(1) // 2
    results = []
    for dense in (False, True):
        generator.manual_seed(seed)
        shapes = (batch, 4, length, 6), (batch, 2, length, 6), (batch, 2, length, 5)
        q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes)
        weights = torch.randn(batch, 4, length, 5, generator=generator, dtype=torch.float64)
        masked = partial(sdpa.attend, scale=None)
        if dense:
            found = masked(q, k, v, masks.dense(segments) & masks.window(length, size, CPU))
        else:
            found = within_segments(partial(blockwise, masked, size), q, k, v, segments)
        (found * weights).sum().backward()
        results.append((found.detach(), q.grad, k.grad, v.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("further", [{}, {"softcap": 1.5, "sinks_H": SINKS}])
@pytest.mark.parametrize("window", [None, 1, 3, 7])
def test_the_last_queries_attend_as_in_the_whole_row(window, further):
    """Keys up to any position, and any number of queries before it."""
    q, k, v = inputs(2)
    masked = partial(eager.attend if further else sdpa.attend, scale=0.3, **further)
    attend = partial(blockwise, masked, window)
    for segments in (SEGMENTS, torch.zeros_like(SEGMENTS)):
        whole = within_segments(attend, q, k, v, segments)
        for end in range(1, 8):
            for begin in range(end):
                found = within_segments(attend, q[:, :, begin:end], k[:, :, :end], v[:, :, :end], segments)
                # The eager softmax is in fp32.
                torch.testing.assert_close(found, whole[:, :, begin:end], atol=1e-6 if further else 1e-12, rtol=0)


def test_no_call_sees_more_than_a_segment_and_a_window():
    """Queries x keys of all calls: their number grows with the row, not with its square."""
    sizes = []

    def masked(q, k, v, mask):
        sizes.append((q.shape[2], k.shape[2]))
        return sdpa.attend(q, k, v, mask, scale=None)

    def products(length):
        sizes.clear()
        q, k, v = torch.zeros(1, 4, length, 4), torch.zeros(1, 1, length, 4), torch.zeros(1, 1, length, 4)
        within_segments(partial(blockwise, masked, 32), q, k, v, torch.arange(length)[None] // 100)
        return sum(queries * keys for queries, keys in sizes)

    assert products(1000) == 10 * products(100)
    assert max(keys for _, keys in sizes) == 2 * 32 - 1
