"""The gated delta rule in plain torch, chunk by chunk."""

from __future__ import annotations

import torch

CHUNK = 64  # tokens that are computed at once; between chunks only the state is carried


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a state that starts at zero answers to each token's query.

    With `k` and `q` scaled to length one, a token's state is `S = a (I - b k k^T) S' + b k v^T`, where `S'` is that
    of the token before it, and its answer is `S^T q / sqrt(key_head_dim)` (Yang et al., 2024, equation 10). Within a
    chunk the updates are solved for together (their section 3.3).

    Args:
        query, key: `[batch, sequence, heads, key_head_dim]`.
        value: `[batch, sequence, heads, value_head_dim]`.
        decay: `log a`, at most zero, `[batch, sequence, heads]`.
        beta: `b`, `[batch, sequence, heads]`.
        segments: `[batch, sequence]` integers that never fall; where they rise the state starts at zero again.

    Returns:
        `[batch, sequence, heads, value_head_dim]` of the value's type, computed in fp32 or in float64 if that is given.
    """
    length, dtype = value.shape[1], torch.promote_types(value.dtype, torch.float32)
    padding = -length % CHUNK

    def chunked(x: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence, heads, ..]` to `[chunks, batch, heads, CHUNK, ..]`."""
        x = x.to(dtype).transpose(1, 2)
        x = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 3) + (0, padding))
        return x.unflatten(2, (-1, CHUNK)).movedim(2, 0)

    q, k, v, g, b = (chunked(x) for x in (query, key, value, decay, beta))
    q, k = unit(q) * q.shape[-1] ** -0.5, unit(k)
    g = g.cumsum(-1)  # since the chunk's start

    allowed = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()
    reaches, lasts = (torch.ones((), dtype=dtype, device=v.device),) * 2
    if segments is not None:
        ids = torch.cat([segments, segments[:, -1:].expand(-1, padding)], dim=1)
        ids = ids.unflatten(1, (-1, CHUNK)).movedim(1, 0)[:, :, None]  # [chunks, batch, 1, CHUNK]
        allowed = allowed & (ids[..., :, None] == ids[..., None, :])
        before = torch.cat([ids[:1, ..., 0], ids[:-1, ..., -1]])
        reaches = (ids == before[..., None]).to(dtype)  # of the state at the chunk's start, to a token
        lasts = (ids == ids[..., -1:]).to(dtype)  # of a token, to the state at the chunk's end
    # Decay from the token of a column to that of a row.
    between = (g[..., :, None] - g[..., None, :]).masked_fill(~allowed, -torch.inf).exp()
    since = (g.exp() * reaches)[..., None]
    until = ((g[..., -1:] - g).exp() * lasts)[..., None]
    kept = since[..., -1:, :]

    # u = b v - sum over earlier tokens of their u, as far as this token's key remembers them: a triangular system.
    weighted = k * b[..., None]
    system = (weighted @ k.mT) * between
    solved = torch.linalg.solve_triangular(
        system, torch.cat([v * b[..., None], weighted * since], -1), upper=False, unitriangular=True
    )
    updates, forgotten = solved.split([v.shape[-1], k.shape[-1]], -1)
    scores, q, k = (q @ k.mT) * between, q * since, k * until

    state = torch.zeros_like(k[0].mT @ updates[0])
    answers = []
    for chunk in range(len(q)):
        learned = updates[chunk] - forgotten[chunk] @ state
        answers.append(q[chunk] @ state + scores[chunk] @ learned)
        state = state * kept[chunk] + k[chunk].mT @ learned
    answer = torch.stack(answers, dim=2).flatten(2, 3)[:, :, :length]
    return answer.transpose(1, 2).to(value.dtype)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors of the last dimension scaled to length one, as far as they are not all but zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
