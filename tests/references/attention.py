"""Attention one query at a time in float64, and inputs for it."""

import torch

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2]])


def attention(q, k, v, allowed, scale, softcap=None, sinks=None):
    """`softmax([cap tanh(scale q k^T / cap) | sink])[..., :S] v`, `[B, H, S, V]`, over keys that are `allowed` `[B, S, S]`."""
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


def inputs(groups):
    """q `[2, 4, 7, 6]`, k `[2, groups, 7, 6]`, v `[2, groups, 7, 5]`, random."""
    generator = torch.Generator().manual_seed(groups)
    shapes = (2, 4, 7, 6), (2, groups, 7, 6), (2, groups, 7, 5)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
