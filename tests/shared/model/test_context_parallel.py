"""Attention over ranks that exchange keys and values, or heads, against the same attention of whole rows.

Ranks are threads here. Losses and gradients in processes: `tests/layouts`.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shared.architecture.architecture import Alibi
from shared.model import context_parallel
from shared.model.context_parallel import HeadExchange, KeyValueGather, chunks_of_rank

KINDS = {
    "causal": {},
    "window": {"window": 5},
    "wide window": {"window": 60},
    "alibi": {"rotary": None, "alibi": Alibi()},
    "rounded alibi": {"rotary": None, "alibi": Alibi(rounded=True)},
    "soft cap": {"softcap": 3.0},
    "sinks": {"sinks": True, "window": 3},
}
LENGTH = 24
SEGMENTS = torch.tensor([[1] * 5 + [2] * 14 + [3] * 5, [1] * 9 + [2] * 2 + [0] * 13])


class Ranks:
    """Groups of `size` threads, and their collectives."""

    def __init__(self, size):
        self.size, self.barrier, self.sent = size, threading.Barrier(size), [None] * size

    def group(self, rank):
        return Group(self, rank)

    def exchange(self, rank, x):
        self.sent[rank] = x
        self.barrier.wait()
        sent = list(self.sent)
        self.barrier.wait()
        return sent


class Group:
    def __init__(self, ranks, rank):
        self.ranks, self._rank = ranks, rank

    def size(self):
        return self.ranks.size

    def rank(self):
        return self._rank


def gather(x, group):
    return torch.cat(group.ranks.exchange(group.rank(), x))


def all_to_all(group, x):
    return torch.cat([sent.chunk(group.size())[group.rank()] for sent in group.ranks.exchange(group.rank(), x)])


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(context_parallel, "gather_from_sequence_parallel_region", gather)
    monkeypatch.setattr(context_parallel, "all_to_all", all_to_all)


def part(x, rank, size):
    return torch.cat([x.chunk(2 * size)[index] for index in chunks_of_rank(rank, size)])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("exchange", "size"), [(KeyValueGather, 2), (KeyValueGather, 3), (HeadExchange, 2)])
def test_ranks_attend_as_one(exchange, size, kind, packed, threads, model_of, worker):
    changes = {"heads": 4, "groups": 2, **KINDS[kind]}
    model = model_of(worker.architecture(attention=changes, num_layers=1))
    attention = model.decoder.layers[0].self_attention.core_attention
    q = torch.randn(LENGTH, 2, 4, 16, dtype=torch.float64)
    k, v = torch.randn(2, LENGTH, 2, 2, 16, dtype=torch.float64)
    segments = SEGMENTS if packed else None
    whole = attention(q, k, v, segments)
    ranks = Ranks(size)

    def of(rank):
        own = ranks.group(rank)
        chosen = exchange(own)
        # The layer's own attention with this rank's exchange, slopes and sinks.
        other = object.__new__(type(attention))
        other.__dict__ = {**attention.__dict__, "exchange": chosen}
        if attention.slopes is not None:
            other.slopes = chosen.heads(attention.slopes)
        with torch.no_grad():
            return other(*(part(x, rank, size) for x in (q, k, v)), segments)

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(of, range(size)))
    # The softmax with soft cap or sinks is in fp32, ALiBi's bias too.
    tolerance = 1e-6 if kind in ("soft cap", "sinks", "alibi", "rounded alibi") else 1e-12
    for rank, attended in enumerate(found):
        torch.testing.assert_close(attended, part(whole, rank, size), atol=tolerance, rtol=0)


def test_every_rank_has_the_same_share_of_causal_attention():
    for size in (1, 2, 3, 8):
        held = [chunks_of_rank(rank, size) for rank in range(size)]
        assert sorted(chunk for pair in held for chunk in pair) == list(range(2 * size))
        assert {first + last for first, last in held} == {2 * size - 1}
