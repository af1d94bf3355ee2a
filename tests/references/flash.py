"""The contract of flash-attn's variable-length kernels, written out, and packages that have it.

As in flash-attn's documentation: causal masks and windows are aligned to the last query and the last key of a sequence. Query i
attends to keys from `i + keys - queries - left` to `i + keys - queries + right`, both included; -1 is no limit. ALiBi's bias is
`-slope |i + keys - queries - j|`. The backward pass makes weights as `exp(score - lse)` of the `lse` it is given, and
`rowsum(dout out)` of the `out` it is given.
"""

import sys
from itertools import pairwise
from types import ModuleType

import torch


def _scores(q, k, scale, causal, window, softcap, slopes):
    """Scores `[H, Q, K]`, -inf where masked, and their derivative by `scale q k^T`; one sequence."""
    (queries, heads, _), keys = q.shape, k.shape[0]
    k = k.repeat_interleave(heads // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    slope = torch.ones_like(scores)
    if softcap:
        slope = 1 - torch.tanh(scores / softcap) ** 2
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)[None, :]
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype)[:, None, None] * distance.abs()
    left, right = window
    right = 0 if causal else right
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        allowed &= distance <= left
    if right >= 0:
        allowed &= -distance <= right
    return scores.masked_fill(~allowed, -torch.inf), slope


def _sequences(q, k, cu_q, cu_k, max_q, max_k):
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert q.shape[-1] == k.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert (cu_q[0], cu_k[0], cu_q[-1], cu_k[-1]) == (0, 0, len(q), len(k))
    assert (cu_q.diff().max(), cu_k.diff().max()) == (max_q, max_k)
    return [(slice(a, b), slice(c, d)) for (a, b), (c, d) in zip(_pairs(cu_q), _pairs(cu_k), strict=True)]


def _pairs(cumulative):
    numbers = cumulative.tolist()
    return pairwise(numbers)


def forward(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, causal, window, softcap=0.0, slopes=None):
    """`out` `[T, H, W]` and `lse` `[H, T]`; differentiable."""
    assert v.shape == k.shape
    outs, sums = [], []
    for rows, columns in _sequences(q, k, cu_q, cu_k, max_q, max_k):
        scores, _ = _scores(q[rows], k[columns], scale, causal, window, softcap, slopes)
        values = v[columns].repeat_interleave(q.shape[1] // k.shape[1], 1)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, 1)


def backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, *, scale, causal, window, softcap=0.0, slopes=None):
    """Gradients of q, k and v."""
    repeats = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, columns in _sequences(q, k, cu_q, cu_k, max_q, max_k):
        scores, slope = _scores(q[rows], k[columns], scale, causal, window, softcap, slopes)
        weights = (scores - lse[:, rows, None]).exp()
        keys, values = (x[columns].repeat_interleave(repeats, 1) for x in (k, v))
        products = torch.einsum("qhd,khd->hqk", grad[rows], values)
        delta = (grad[rows] * out[rows]).sum(-1).T[..., None]
        slopes_of_scores = weights * (products - delta) * slope * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", slopes_of_scores, keys)
        for into, found in (
            (dk, torch.einsum("hqk,qhd->khd", slopes_of_scores, q[rows])),
            (dv, torch.einsum("hqk,qhd->khd", weights, grad[rows])),
        ):
            into[columns] = found.unflatten(1, (-1, repeats)).sum(2)
    return dq, dk, dv


def register_for_torch():
    """Torch's operators under `torch.nn.attention.varlen`, which have CUDA kernels only, on CPU. Keep the result."""
    library = torch.library.Library("aten", "IMPL")

    def flash_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        window_size_left=None, window_size_right=None, **others,
    ):  # fmt: skip
        assert not dropout_p
        assert not [each for each in others.values() if each is not None]
        window = (window_size_left, window_size_right)
        out, lse = forward(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, causal=is_causal, window=window)
        empty = torch.empty(0)
        return out, lse, empty, empty.clone(), empty.clone()

    def flash_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale=None,
        window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert not dropout_p
        window = (window_size_left, window_size_right)
        lengths = cu_q, cu_k, max_q, max_k
        return backward(grad, q, k, v, out, lse, *lengths, scale=scale, causal=is_causal, window=window)

    library.impl("_flash_attention_forward", flash_forward, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    return library


def _package(monkeypatch, name, **content):
    """A package whose last module has this content."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:length]), ModuleType(".".join(parts[:length])))
    for key, value in content.items():
        setattr(sys.modules[name], key, value)


def install_flash_attn_2(monkeypatch):
    """Package `flash_attn`, with the signatures of 2.8."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert not dropout_p
        assert alibi_slopes is None or alibi_slopes.dtype == torch.float32
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        masks = {"scale": softmax_scale, "causal": causal, "window": window_size}
        return forward(q, k, v, *lengths, **masks, softcap=softcap, slopes=alibi_slopes)[0]

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert not dropout_p
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        masks = {"scale": softmax_scale, "causal": causal, "window": (window_size_left, window_size_right)}
        out, lse = forward(q, k, v, *lengths, **masks, softcap=softcap, slopes=alibi_slopes)
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert not dropout_p
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        masks = {"scale": softmax_scale, "causal": causal, "window": (window_size_left, window_size_right)}
        found = backward(dout, q, k, v, out, softmax_lse, *lengths, **masks, softcap=softcap, slopes=alibi_slopes)
        for into, gradient in zip((dq, dk, dv), found, strict=True):
            into.copy_(gradient)

    functions = (flash_attn_varlen_func, _flash_attn_varlen_forward, _flash_attn_varlen_backward)
    _package(monkeypatch, "flash_attn.flash_attn_interface", **{each.__name__: each for each in functions})


def install_flash_attn_3(monkeypatch):
    """Module `flash_attn_interface` of flash-attn 3."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        masks = {"scale": softmax_scale, "causal": causal, "window": window_size}
        return forward(q, k, v, *lengths, **masks, softcap=softcap)[0]

    _package(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=flash_attn_varlen_func)


def install_transformer_engine(monkeypatch):
    """TransformerEngine's DotProductAttention, for packed tokens."""

    class DotProductAttention(torch.nn.Module):
        def __init__(
            self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
            attn_mask_type="causal", window_size=None, softmax_scale=None,
        ):  # fmt: skip
            super().__init__()
            self.sizes = num_attention_heads, num_gqa_groups, kv_channels
            self.scale, self.dropout = softmax_scale, attention_dropout

        def forward(
            self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None, cu_seqlens_q=None,
            cu_seqlens_kv=None, max_seqlen_q=None, max_seqlen_kv=None, attn_mask_type=None, window_size=None,
        ):  # fmt: skip
            assert (query_layer.shape[1], key_layer.shape[1], query_layer.shape[2]) == self.sizes
            assert not self.dropout
            assert qkv_format == "thd"
            assert attn_mask_type in ("padding_causal", "padding_causal_bottom_right")
            if attn_mask_type == "padding_causal":
                assert torch.equal(cu_seqlens_q, cu_seqlens_kv)
            lengths = cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv
            masks = {"scale": self.scale, "causal": True, "window": window_size}
            return forward(query_layer, key_layer, value_layer, *lengths, **masks)[0].flatten(1)

    _package(monkeypatch, "transformer_engine.pytorch", DotProductAttention=DotProductAttention)
