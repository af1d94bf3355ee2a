"""The default process group, with and without a launcher, with and without CUDA."""

import pytest
import torch
import torch.distributed as dist

from shared.runtime.world import join_world


@pytest.fixture
def started(monkeypatch):
    """Arguments of torch's calls."""
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **more: calls.append((*args, more)))
    return calls


@pytest.mark.parametrize(("cuda", "backend"), [(True, "nccl"), (False, "gloo")])
def test_the_world_is_the_launchers_else_one_process(cuda, backend, started, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.delenv("RANK", raising=False)
    join_world()
    join_world()  # joined already
    [(asked, more)] = started
    assert (asked, more["rank"], more["world_size"]) == (backend, 0, 1)

    started.clear()
    monkeypatch.setenv("RANK", "3")
    join_world()
    assert started == [(backend, {})]
