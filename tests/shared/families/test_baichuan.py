"""Baichuan's four models share one model_type and are distinguished by other fields."""

from __future__ import annotations

from typing import Any

import pytest

from shared.architecture.architecture import Attention
from shared.errors import UserError
from shared.families import registry


def config(size: str, **changes: Any) -> dict[str, Any]:
    return registry.to_config(registry.sizes()[size]) | changes


@pytest.mark.parametrize(
    ("size", "positions", "normalized"),
    [
        ("baichuan-7b", "rope", False),
        ("baichuan-13b", "alibi", False),
        ("baichuan2-7b", "rope", True),
        ("baichuan2-13b", "alibi", True),
    ],
)
def test_what_each_is_read_as(size: str, positions: str, normalized: bool) -> None:
    given = config(size)
    given.pop("z_loss_weight", None)  # Baichuan2-13B was published without it; its vocabulary tells
    read = registry.from_config(given)
    attention = read.attention
    assert isinstance(attention, Attention)
    assert (attention.rotary is not None, attention.alibi is not None) == (positions == "rope", positions == "alibi")
    assert read.head.normalized == normalized


def test_a_vocabulary_that_was_changed_leaves_the_head_as_it_was() -> None:
    assert registry.from_config(config("baichuan2-7b", vocab_size=100_000)).head.normalized
    assert not registry.from_config(config("baichuan-7b", vocab_size=64_064)).head.normalized


def test_positions_that_contradict_the_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"remove max_position_embeddings: .* hidden_size 5120 have ALiBi"):
        registry.from_config(config("baichuan-13b", max_position_embeddings=4096))
    short = config("baichuan-7b")
    del short["max_position_embeddings"]
    with pytest.raises(UserError, match=r"add max_position_embeddings: .* hidden_size 4096 have RoPE"):
        registry.from_config(short)


@pytest.mark.parametrize(("name", "value"), [("z_loss_weight", 1e-4), ("rope_theta", 1e6), ("num_key_value_heads", 8)])
def test_what_would_change_the_model_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name):
        registry.from_config(config("baichuan-7b", **{name: value}))
