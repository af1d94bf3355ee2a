import pytest
import torch

from shared.kernels.attention import eager, masks


def reference(q, k, v, allowed, scale, softcap=None, sinks=None):
    """One query at a time, in float64."""
    batch, heads, length, _ = q.shape
    shared = heads // k.shape[1]
    result = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                scores = (k[b, h // shared] @ q[b, h, i]) * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores[allowed[b, i]].exp()
                total = weights.sum() + (sinks[h].exp() if sinks is not None else 0.0)
                result[b, h, i] = (weights / total) @ v[b, h // shared][allowed[b, i]]
    return result


def tensors(groups):
    generator = torch.Generator().manual_seed(groups)
    shapes = (2, 4, 7, 6), (2, groups, 7, 6), (2, groups, 7, 5)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2]])
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("further", [{}, {"softcap": 1.5}, {"sinks": SINKS}, {"softcap": 1.5, "sinks": SINKS}])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_is_attention(groups, packed, further):
    q, k, v = tensors(groups)
    mask = masks.dense(SEGMENTS) if packed else None
    allowed = masks.dense(SEGMENTS if packed else torch.zeros_like(SEGMENTS))[:, 0]
    named = {"sinks_H" if name == "sinks" else name: value for name, value in further.items()}
    found = eager.attend(q, k, v, mask, scale=0.3, **named)
    # Softmax is fp32.
    torch.testing.assert_close(found, reference(q, k, v, allowed, 0.3, **further), atol=1e-6, rtol=0)
