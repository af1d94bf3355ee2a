from itertools import product

import pytest
import torch

from shared.kernels.attention import masks, sdpa
from tests.references.attention import SEGMENTS, attention, inputs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_is_attention(groups, packed):
    q, k, v = inputs(groups)
    mask = masks.dense(SEGMENTS) if packed else None
    allowed = masks.dense(SEGMENTS if packed else torch.zeros_like(SEGMENTS))[:, 0]
    found = sdpa.masked(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(found, attention(q, k, v, allowed, 0.3), atol=1e-12, rtol=0)
    by_size = attention(q, k, v, allowed, 6**-0.5)
    torch.testing.assert_close(sdpa.masked(q, k, v, mask, scale=None), by_size, atol=1e-12, rtol=0)


def test_grouped_queries_reach_a_fused_kernel_on_cuda():
    """torch's flash kernel takes them without a mask; the memory-efficient and cuDNN's (below Hopper) never do."""
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for dtype, given, head_dim, value_dim in product(
        (torch.bfloat16, torch.float16, torch.float32), (None, mask), (64, 256, 512), (64, 256, 512)
    ):
        flash = dtype != torch.float32 and given is None and head_dim == value_dim and head_dim <= 256
        assert sdpa.takes_groups("cuda", dtype, given, head_dim, value_dim) == flash
        assert sdpa.takes_groups("cpu", dtype, given, head_dim, value_dim)


@pytest.mark.parametrize("packed", [False, True])
def test_repeated_keys_and_values_are_the_same_attention(packed, monkeypatch):
    q, k, v = inputs(2)
    mask = masks.dense(SEGMENTS) if packed else None
    grouped = sdpa.masked(q, k, v, mask, scale=0.3)
    monkeypatch.setattr(sdpa, "takes_groups", lambda *given: False)
    kernel, asked = sdpa.scaled_dot_product_attention, []
    monkeypatch.setattr(
        sdpa, "scaled_dot_product_attention", lambda *given, **named: asked.append(named) or kernel(*given, **named)
    )
    torch.testing.assert_close(sdpa.masked(q, k, v, mask, scale=0.3), grouped, atol=1e-12, rtol=0)
    assert [named["enable_gqa"] for named in asked] == [False]
