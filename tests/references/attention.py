"""Attention one query at a time in float64, and inputs for it."""

import torch

from shared.kernels.attention.needs import Call, Features

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2]])


def attention(q, k, v, allowed, scale, softcap=None, sinks=None, bias=None):
    """`softmax([cap tanh(scale q k^T / cap) + bias | sink])[..., :K] v`, `[B, H, Q, V]`, over keys `allowed`.

    `allowed`: `[B, Q, K]`; `bias`: `[B, H, Q, K]`.
    """
    batch, heads, length, _ = q.shape
    shared = heads // k.shape[1]
    result = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                scores = (k[b, h // shared] @ q[b, h, i]) * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if bias is not None:
                    scores = scores + bias[b, h, i]
                weights = scores[allowed[b, i]].exp()
                total = weights.sum() + (sinks[h].exp() if sinks is not None else 0.0)
                result[b, h, i] = (weights / total) @ v[b, h // shared][allowed[b, i]]
    return result


def inputs(groups):
    """q `[2, 4, 7, 6]`, k `[2, groups, 7, 6]`, v `[2, groups, 7, 5]`, random."""
    generator = torch.Generator().manual_seed(groups)
    shapes = (2, 4, 7, 6), (2, groups, 7, 6), (2, groups, 7, 5)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def call(q, k, v, segments=None, features=None):
    """A `Call`."""
    return Call(q_BHQD=q, k_BGKD=k, v_BGKV=v, segments=segments, features=features or Features())
