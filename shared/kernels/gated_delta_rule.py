"""Chunked gated delta rule in plain torch."""

from __future__ import annotations

import torch

CHUNK = 64  # tokens per chunk; only the state is carried between chunks


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gated delta rule with initial state 0 (Yang et al., 2024, equation 10; chunked form: section 3.3).

    For each token, with q and k L2-normalised and S' the previous token's state:

        S = a (I - b k k^T) S' + b k v^T
        output = S^T q / sqrt(key_head_dim)

    Args:
        query, key: `[batch, sequence, heads, key_head_dim]`.
        value: `[batch, sequence, heads, value_head_dim]`.
        decay: `log a`, at most zero, `[batch, sequence, heads]`.
        beta: `b`, `[batch, sequence, heads]`.
        segments: `[batch, sequence]` non-decreasing integers; the state is reset to 0 where they increase.

    Returns:
        `[batch, sequence, heads, value_head_dim]` in the dtype of `value`; computed in fp32, in fp64 for fp64 inputs.
    """
    length, dtype = value.shape[1], torch.promote_types(value.dtype, torch.float32)
    padding = -length % CHUNK

    def chunked(x: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence, heads, ..]` to `[chunks, batch, heads, CHUNK, ..]`."""
        x = x.to(dtype).transpose(1, 2)
        x = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 3) + (0, padding))
        return x.unflatten(2, (-1, CHUNK)).movedim(2, 0)

    q, k, v, g, b = (chunked(x) for x in (query, key, value, decay, beta))
    q, k = l2norm(q) * q.shape[-1] ** -0.5, l2norm(k)
    # log a from token (column) to token (row), both in the chunk: sums of the steps in between. Differences of sums from the
    # start of the chunk would round small ones away, in their gradients most (Mamba-2, Dao and Gu, 2024, listing 1: segsum).
    allowed = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()
    between = g[..., :, None].expand(*g.shape, CHUNK).masked_fill(~allowed.tril(-1), 0).cumsum(-2)
    in_segment, out_segment = (torch.ones((), dtype=dtype, device=v.device),) * 2
    if segments is not None:
        ids = torch.cat([segments, segments[:, -1:].expand(-1, padding)], dim=1)
        ids = ids.unflatten(1, (-1, CHUNK)).movedim(1, 0)[:, :, None]  # [chunks, batch, 1, CHUNK]
        allowed = allowed & (ids[..., :, None] == ids[..., None, :])
        before = torch.cat([ids[:1, ..., 0], ids[:-1, ..., -1]])
        in_segment = (ids == before[..., None]).to(dtype)  # 1: the token is in the segment of the incoming state
        out_segment = (ids == ids[..., -1:]).to(dtype)  # 1: the token is in the segment of the outgoing state
    decay_between = between.masked_fill(~allowed, -torch.inf).exp()
    decay_in = (g.cumsum(-1).exp() * in_segment)[..., None]
    decay_out = (between[..., -1, :].exp() * out_segment)[..., None]
    state_decay = decay_in[..., -1:, :]

    # u_t = b_t v_t - b_t sum_{s<t} decay(s, t) (k_t . k_s) u_s - (incoming state): a unit lower triangular system.
    weighted = k * b[..., None]
    system = (weighted @ k.mT) * decay_between
    solved = torch.linalg.solve_triangular(
        system, torch.cat([v * b[..., None], weighted * decay_in], -1), upper=False, unitriangular=True
    )
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    scores, q, k = (q @ k.mT) * decay_between, q * decay_in, k * decay_out

    state = torch.zeros_like(k[0].mT @ u[0])
    outputs = []
    for chunk in range(len(q)):
        v_new = u[chunk] - w[chunk] @ state
        outputs.append(q[chunk] @ state + scores[chunk] @ v_new)
        state = state * state_decay[chunk] + k[chunk].mT @ v_new
    output = torch.stack(outputs, dim=2).flatten(2, 3)[:, :, :length]
    return output.transpose(1, 2).to(value.dtype)


def l2norm(x: torch.Tensor) -> torch.Tensor:
    """L2 normalisation over the last dimension: `x / sqrt(sum(x^2) + 1e-6)`."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
