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
    found = sdpa.attend(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(found, attention(q, k, v, allowed, 0.3), atol=1e-12, rtol=0)
    by_size = attention(q, k, v, allowed, 6**-0.5)
    torch.testing.assert_close(sdpa.attend(q, k, v, mask, scale=None), by_size, atol=1e-12, rtol=0)
