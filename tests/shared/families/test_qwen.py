"""Qwen 1's configuration: maximum sequence length, and fields that change the model."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import UserError
from shared.families import registry


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({}, 2048),  # Qwen-14B
        ({"use_dynamic_ntk": False}, 2048),
        ({"use_logn_attn": False}, 2048),
        ({"use_dynamic_ntk": False, "use_logn_attn": False}, 8192),
    ],
)
def test_the_model_ends_where_inference_would_differ_from_training(changes: dict[str, Any], positions: int) -> None:
    config = registry.to_config(registry.sizes()["qwen-14b"]) | {"max_position_embeddings": 8192, "seq_length": 2048}
    assert registry.from_config(config | changes).max_position_embeddings == positions


@pytest.mark.parametrize(
    ("name", "value"),
    [("kv_channels", 64), ("rope_theta", 1e6), ("visual", {"layers": 48})],
)
def test_what_would_change_the_model_is_refused_by_name(name: str, value: Any) -> None:
    config = registry.to_config(registry.sizes()["qwen-7b"])
    with pytest.raises(UserError, match=name):
        registry.from_config(config | {name: value})
