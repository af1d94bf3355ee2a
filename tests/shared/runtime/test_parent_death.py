"""A child ends with its parent, also if the parent died before the child's request."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
PARENT = """
import os, sys, time
from shared.runtime.parent_death import die_with_parent
parent = os.getpid()
child = os.fork()
if child == 0:
    if sys.argv[1] == "late":
        while os.getppid() == parent:
            time.sleep(0.01)
    die_with_parent(parent)
    print(os.getpid(), flush=True)
    os.close(1)
    time.sleep(60)
if sys.argv[1] == "late":
    print(child, flush=True)
    os._exit(0)
time.sleep(60)
"""


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ends(process: int) -> bool:
    deadline = time.monotonic() + 30
    while running(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running(process)


def start(when: str) -> tuple[subprocess.Popen[str], int]:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, when], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def test_a_killed_parent_takes_its_child_along() -> None:
    parent, child = start("early")
    assert running(child)
    parent.kill()
    parent.communicate()
    assert ends(child)


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    parent, child = start("late")
    assert ends(child)
    assert parent.communicate()[0] == ""  # the child did not get past the call
