import pytest
import torch

from shared.kernels.attention import eager, masks
from shared.kernels.attention.needs import Features
from tests.references.attention import SEGMENTS, attention, call, inputs

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("further", [{}, {"softcap": 1.5}, {"sinks": SINKS}, {"softcap": 1.5, "sinks": SINKS}])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_is_attention(groups, packed, further):
    q, k, v = inputs(groups)
    allowed = masks.dense(SEGMENTS if packed else torch.zeros_like(SEGMENTS))[:, 0]
    named = {"sinks_H" if name == "sinks" else name: value for name, value in further.items()}
    found = eager.attend(call(q, k, v, SEGMENTS if packed else None, Features(scale=0.3, **named)))
    # float64 sums of 7 terms in another order.
    torch.testing.assert_close(found, attention(q, k, v, allowed, 0.3, **further), atol=1e-12, rtol=0)


def test_softmax_of_half_precision_is_in_fp32():
    """Weights of 1 / 300 summed over 300 keys: rounded in the softmax, their sum would be off by far more than one rounding."""
    q, k = torch.zeros(1, 1, 300, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 300, 8, dtype=torch.bfloat16)
    v = torch.eye(300, dtype=torch.bfloat16)[None, None]
    weights = eager.attend(call(q, k, v, None, Features()))[0, 0]
    exact = torch.ones(300, 300).tril() / torch.arange(1, 301)[:, None]
    assert torch.equal(weights, exact.bfloat16())
