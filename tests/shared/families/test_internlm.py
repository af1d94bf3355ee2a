"""InternLM 1's rotary embedding and its legacy config fields."""

from __future__ import annotations

from typing import Any

import pytest

from shared.architecture.architecture import RopeScaling, Rotary
from shared.errors import UserError
from shared.families import registry


@pytest.mark.parametrize(
    ("rotary", "theta", "scaling"),
    [
        (None, 10_000.0, None),  # as the first models were published
        ({"base": 10_000, "type": "origin"}, 10_000.0, None),
        ({"base": 1e6, "type": "dynamic"}, 1e6, RopeScaling(kind="dynamic", factor=1.0)),
        ({"base": 1e4, "type": "dynamic", "scaling_factor": 2}, 1e4, RopeScaling(kind="dynamic", factor=2.0)),
    ],
)
def test_rotary(rotary: dict[str, Any] | None, theta: float, scaling: RopeScaling | None) -> None:
    read = registry.from_config(registry.to_config(registry.sizes()["internlm-7b"]) | {"rotary": rotary})
    assert read.attention.rotary == Rotary(theta=theta, scaling=scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary": {"base": 1e4, "type": "linear"}}, "type = 'linear'"),
        ({"rotary": {"base": 1e4, "type": "origin", "offset": 3}}, r"offset = 3 .* internlm \(rotary\)"),
        ({"rope_theta": 1e6}, "rope_theta"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ],
)
def test_what_would_change_the_model_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.from_config(registry.to_config(registry.sizes()["internlm-7b"]) | changes)
