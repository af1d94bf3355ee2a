"""The gated delta rule against its recurrence in float64 and transformers; packed rows against single sequences."""

from __future__ import annotations

import pytest
import torch

from shared.kernels.gated_delta_rule import gated_delta_rule, l2norm


def given(length: int, heads: int = 3, key: int = 8, value: int = 5, dtype: torch.dtype = torch.float64):
    torch.manual_seed(length)
    q, k = torch.randn(2, 2, length, heads, key, dtype=dtype)
    v = torch.randn(2, length, heads, value, dtype=dtype)
    decay = -torch.rand(2, length, heads, dtype=dtype) * torch.tensor([0.001, 0.1, 8.0], dtype=dtype)
    return q, k, v, decay, torch.rand(2, length, heads, dtype=dtype)


def recurrence(q, k, v, decay, beta):
    """Equation 10 of the paper, token by token; the state is its transpose, `[key, value]`."""
    q, k = l2norm(q), l2norm(k)
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=q.dtype)
    one = torch.eye(q.shape[3], dtype=q.dtype)
    answers = []
    for t in range(q.shape[1]):
        kk = k[:, t, :, :, None] * k[:, t, :, None, :]
        a, b = decay[:, t, :, None, None].exp(), beta[:, t, :, None, None]
        state = a * ((one - b * kk) @ state) + b * k[:, t, :, :, None] * v[:, t, :, None, :]
        answers.append((q[:, t, :, None, :] @ state).squeeze(-2) / q.shape[-1] ** 0.5)
    return torch.stack(answers, dim=1)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_chunks_compute_the_recurrence(length: int) -> None:
    inputs = [x.requires_grad_() for x in given(length)]
    ours, theirs = gated_delta_rule(*inputs), recurrence(*inputs)
    # float64: rounding alone, a few hundred operations deep.
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_as_transformers_computes_it() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, k, v, decay, beta = given(300, dtype=torch.float32)
    theirs, _ = torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)
    # fp32 sums of the same numbers in another order.
    torch.testing.assert_close(gated_delta_rule(q, k, v, decay, beta), theirs, rtol=1e-5, atol=1e-6)


def test_a_segment_knows_nothing_of_those_before_it() -> None:
    lengths = [1, 5, 70, 2, 64, 130]
    inputs = given(sum(lengths))
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    packed = gated_delta_rule(*inputs, segments)
    alone = [recurrence(*parts) for parts in zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-10, atol=1e-12)


def test_strong_decay_leaves_no_nan() -> None:
    q, k, v, decay, beta = given(130, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v, decay * 100, beta)]
    answer = gated_delta_rule(*inputs)
    torch.testing.assert_close(answer, recurrence(*(x.double() for x in inputs)).float(), rtol=1e-4, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(answer.sum(), inputs))


@pytest.mark.parametrize("strength", [0.1, 1.0, 5.0, 11.0])
def test_the_gradient_of_strong_decay_is_exact_in_fp32(strength: float) -> None:
    """At 11 per token it is 1e-5 of the other gradients, and rounding of these must not reach it."""
    q, k, v, decay, beta = given(200, dtype=torch.float32)
    single = [x.requires_grad_() for x in (q, k, v, (decay * 0 - strength) * (1 + decay.cos() / 10), beta)]
    double = [x.detach().double().requires_grad_() for x in single]
    weights = torch.randn(v.shape)
    ours, theirs = (
        torch.autograd.grad((gated_delta_rule(*inputs) * weights).sum(), inputs)[3] for inputs in (single, double)
    )
    assert (ours - theirs).norm() / theirs.norm() < 3e-6  # fp32: 50 times its rounding
