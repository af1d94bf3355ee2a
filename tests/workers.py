"""Processes of tests: a worker script, a world of forked ranks."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def results_under_stubs(worker: Path, directory: Path) -> Any:
    """`python worker DIRECTORY` on an H100 that is not there; returns `DIRECTORY/results.pkl`, which the worker writes."""
    from shared.rehearsal.machine import GPUS
    from shared.rehearsal.reexecute import with_stubs

    done = subprocess.run(
        [sys.executable, str(worker), str(directory)],
        env=with_stubs({**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, GPUS["h100-80"]),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return pickle.loads((directory / "results.pkl").read_bytes())


def results_of(worker: Path, directory: Path) -> Any:
    """`python worker DIRECTORY`, outside of any torchrun job; returns `DIRECTORY/results.json`, which the worker writes."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, str(worker), str(directory)],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((directory / "results.json").read_text())


def forked_world(processes: int, work: Callable[..., None], *given: Any) -> bool:
    """`work(rank, *given)` in a gloo world of forked processes: torch is imported once, by the caller. Whether all succeeded;
    where one fails, the others are ended.
    """
    from shared.runtime.launch import _free_port

    world = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    os.environ |= {name: str(value) for name, value in world.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
    # Megatron-Core collects garbage when it saves and loads: over everything that was imported, a second each time.
    gc.collect()
    gc.freeze()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, os.getpid(), work, *given)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    while any(rank.exitcode is None for rank in ranks):
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    return not any(rank.exitcode for rank in ranks)


def _rank(rank: int, parent: int, work: Callable[..., None], *given: Any) -> None:
    from shared.runtime.parent_death import die_with_parent

    die_with_parent(parent)
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    work(rank, *given)
