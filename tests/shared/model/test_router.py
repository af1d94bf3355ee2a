"""Routers: what padding changes, and what it does not."""

from __future__ import annotations

import torch

from shared.families import registry


def test_padding_is_routed_alike_and_counts_for_nothing(model_of):
    """Of a router with groups and a correction bias."""
    model = model_of(registry.sizes()["deepseek-v3-tiny"]).train()
    router = model.decoder.layers[-1].mlp.router
    torch.manual_seed(2)
    x, padding = torch.randn(9, 3, model.config.hidden_size), torch.rand(9, 3) < 0.4
    probs, chosen = router(x)
    assert torch.equal(router.local_tokens_per_expert, chosen.sum(0).float())
    assert torch.equal(router.take_statistics()[:-1], chosen.sum(0).double())
    router.local_tokens_per_expert.zero_()
    again, same = router(x, padding)
    assert torch.equal(probs, again)
    assert torch.equal(chosen, same)
    kept = chosen[~padding.flatten()].sum(0)
    assert torch.equal(router.local_tokens_per_expert, kept.float())
    assert torch.equal(router.take_statistics()[:-1], kept.double())
    assert router.take_statistics() is None


def test_nothing_is_counted_without_gradients_or_in_evaluation(model_of):
    model = model_of(registry.sizes()["qwen3-moe-tiny"])
    router = model.decoder.layers[0].mlp.router
    x = torch.randn(4, 2, model.config.hidden_size)
    router(x)
    model.train()
    with torch.no_grad():
        router(x)
    assert router.take_statistics() is None
    router(x)
    assert router.take_statistics()[:-1].sum() == 8 * router.topk
