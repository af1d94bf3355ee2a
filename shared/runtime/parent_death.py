"""Processes that end with their parent, even after its SIGKILL (Linux: PR_SET_PDEATHSIG of prctl(2))."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)  # loaded before a fork: a forked child may call few functions


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends. Call it in the child.

    Args:
        parent: the parent's process id; if it has ended already, this process is killed at once.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
