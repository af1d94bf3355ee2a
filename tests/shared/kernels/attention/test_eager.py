import pytest
import torch

from shared.kernels.attention import eager, masks
from tests.references.attention import SEGMENTS, attention, inputs

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("further", [{}, {"softcap": 1.5}, {"sinks": SINKS}, {"softcap": 1.5, "sinks": SINKS}])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_is_attention(groups, packed, further):
    q, k, v = inputs(groups)
    mask = masks.dense(SEGMENTS) if packed else None
    allowed = masks.dense(SEGMENTS if packed else torch.zeros_like(SEGMENTS))[:, 0]
    named = {"sinks_H" if name == "sinks" else name: value for name, value in further.items()}
    found = eager.attend(q, k, v, mask, scale=0.3, **named)
    # Softmax is fp32.
    torch.testing.assert_close(found, attention(q, k, v, allowed, 0.3, **further), atol=1e-6, rtol=0)
