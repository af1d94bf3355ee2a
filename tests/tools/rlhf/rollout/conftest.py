"""A server of roll-outs for a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tools.rlhf.conftest import World
from tests.tools.rlhf.rollout.rollout_server import RolloutServer, serving
from tools.rlhf.rollout import servers


@pytest.fixture
def server(world: World) -> Iterator[RolloutServer]:
    with serving(world.policy) as running:
        yield running


@pytest.fixture
def second(world: World) -> Iterator[RolloutServer]:
    """Another one."""
    with serving(world.policy) as running:
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become tenths."""
    for name in ("PATIENCE", "PAUSE", "PROBE_EVERY", "PROBE_TIMEOUT"):
        monkeypatch.setattr(servers, name, getattr(servers, name) / 20)
