"""Two gloo ranks, for tests of collectives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# torch is imported once and then forked, in a process of its own: nothing of this test session's groups is inherited.
_PROGRAM = """
import os, signal, sys
import torch, torch.distributed as dist
from shared.errors import AlreadyDone, Interrupted, UserError
from shared.runtime.agreement import on_rank_0
from shared.runtime.stop_request import StopRequest

def print(*words, flush=True):  # in one write, lest lines of two ranks mix
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def work(rank):
{body}

def main(rank):
    store = dist.FileStore(sys.argv[1], 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        work(rank)
        return 0
    except SystemExit as end:
        return end.code
    except Exception as error:
        print(rank, type(error).__name__, error, flush=True)
        return 99

children = []
for rank in range(2):
    if (child := os.fork()) == 0:
        os._exit(main(rank))
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


@pytest.fixture
def two_ranks(tmp_path: Path) -> Callable[[str], list[str]]:
    """Run the body of `work(rank)` on two ranks; the lines they print, last the list of their exit codes."""

    def run(body: str) -> list[str]:
        indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
        command = [sys.executable, "-c", _PROGRAM.format(body=indented), str(tmp_path / "store")]
        root = Path(__file__).parents[3]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, timeout=120)
        return done.stdout.splitlines()

    return run
