"""The default process group: with and without a launcher, with and without CUDA, and signals while it forms."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_a_rank_that_waits_for_another(number, rank, tmp_path):
    """torch's wait takes half an hour, and runs no Python signal handler."""
    script = "from shared.runtime.world import join_world\nprint('joining', flush=True)\njoin_world()"
    environment = {
        **os.environ,
        **{"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    }
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[3],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "joining\n"
        time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=30) == 75
        assert time.monotonic() - began < 5
        assert f"rank {rank}: stopped by a signal while it waited for the other ranks" in process.stderr.read()
    finally:
        process.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
