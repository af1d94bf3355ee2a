"""The counts that stand in for a router's."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from shared.rehearsal import fake_world


@pytest.mark.parametrize(("tokens", "experts"), [(64, 8), (61, 8), (3, 8)])
def test_tokens_are_spread_evenly(tokens, experts) -> None:
    each = fake_world.balanced(tokens, experts)
    assert int(each.sum()) == tokens
    assert int(each.max() - each.min()) <= 1


_SET = ("num_out_tokens", "input_splits", "output_splits", "output_splits_tp", "num_global_tokens_per_local_expert")


def dispatcher(ep: int, tp: int, rank: int, tokens: int, monkeypatch):
    """What `preprocess` reads of a dispatcher of 8 experts, and its gather in a world whose ranks have equal counts."""
    local = 8 // ep
    from megatron.core.transformer.moe import token_dispatcher

    def gather(counts, group):
        return counts.repeat(ep * tp)

    monkeypatch.setattr(token_dispatcher, "gather_from_sequence_parallel_region", gather)
    monkeypatch.setattr("megatron.core.tensor_parallel.gather_from_sequence_parallel_region", gather)
    return SimpleNamespace(
        config=SimpleNamespace(
            moe_router_topk=2,
            moe_expert_capacity_factor=None,
            moe_router_padding_for_quantization=False,
            moe_permute_fusion=False,
        ),
        drop_and_pad=False,
        num_experts=8,
        ep_size=ep,
        tp_size=tp,
        tp_rank=0,
        tp_ep_group=None,
        num_local_experts=local,
        local_expert_indices=list(range(rank * local, (rank + 1) * local)),
        cuda_sync_point_priority={"before_permutation_1": 0, "no_sync": 4},
        cuda_dtoh_point="before_permutation_1",
        cuda_sync_point="no_sync",
        _maybe_update_cuda_sync_point=lambda point: None,
    )


@pytest.mark.parametrize(("ep", "tp"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("tokens", [16, 17])
def test_even_counts_are_prepared_as_megatron_core_prepares_them(ep, tp, tokens, monkeypatch) -> None:
    """Its own `preprocess` of a routing map that gives each expert as many tokens."""
    original = MoEAlltoAllTokenDispatcher.preprocess
    chosen = torch.arange(2 * tokens) % 8  # pairs of neighbours: no token chooses an expert twice
    routing_map = torch.zeros(tokens, 8, dtype=torch.bool)
    routing_map[torch.arange(2 * tokens) // 2, chosen] = True
    for rank in range(ep):
        theirs, ours = (dispatcher(ep, tp, rank, tokens, monkeypatch) for _ in range(2))
        of_theirs = original(theirs, routing_map)
        monkeypatch.setattr(MoEAlltoAllTokenDispatcher, "preprocess", original)
        fake_world._replace_counting()
        of_ours = MoEAlltoAllTokenDispatcher.preprocess(ours, torch.zeros_like(routing_map))
        assert of_ours.tolist() == of_theirs.tolist()
        for name in _SET:
            assert hasattr(ours, name) == hasattr(theirs, name), name
            if hasattr(ours, name):
                assert torch.equal(*(torch.as_tensor(getattr(each, name)) for each in (ours, theirs))), name
