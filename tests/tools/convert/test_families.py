"""The table of families."""

from __future__ import annotations

from typing import Any

from shared.families import registry


def test_every_family_and_size_is_listed(convert: Any) -> None:
    answer = convert("families")
    assert answer.code == 0
    for name in (*registry.names(), *registry.sizes()):
        assert name in answer.out
    assert "qwen3-8b (8.19B)" in answer.out
