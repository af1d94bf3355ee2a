"""The same command again, in a process that has the stubs in place of a CUDA runtime. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from shared.errors import UserError
from shared.rehearsal import build_stubs
from shared.rehearsal.machine import Gpu

_PLAYING = "BATON_REHEARSAL"
LIMIT = "BATON_STUB_LIMIT"  # bytes that can be allocated; each rank's process may set its own
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def playing() -> bool:
    """Whether this process has the stubs."""
    return _PLAYING in os.environ


def unchecked() -> list[str]:
    """Functions of the CUDA runtime that this torch wants and nobody has looked at."""
    return os.environ[_PLAYING].split()


def check_environment(environment: Mapping[str, str], *, command: str = "--rehearse", flag: str = "--world") -> None:
    """UserError for what a rehearsal cannot be started in. `command`: what plays the ranks, whose number `flag` says."""
    if "RANK" in environment:
        raise UserError(
            f"{command} plays every rank by itself; start it without torchrun or srun, and give the number of GPUs by {flag}"
        )
    for name in _ALLOCATOR:
        if "expandable_segments:True" in environment.get(name, ""):
            raise UserError(
                f"{command} has no stub for expandable segments; unset {name}, or take expandable_segments out of it"
            )


def reexecute(gpu: Gpu) -> NoReturn:
    """Replace this process. The GPU of this machine, if it has one, is neither seen nor touched from then on.

    Raises:
        UserError: the stubs cannot be built.
    """
    environment = with_stubs(os.environ, gpu)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def with_stubs(environment: Mapping[str, str], gpu: Gpu) -> dict[str, str]:
    """The environment of a process whose CUDA runtime is the stubs. UserError: they cannot be built."""
    found = build_stubs.ensure()
    folder = build_stubs.stubs_folder()

    def before(first: Path, variable: str) -> str:
        return os.pathsep.join([str(first), *filter(None, [environment.get(variable)])])

    return {
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # as `launch` sets it for workers
        **environment,
        "LD_PRELOAD": before(folder / build_stubs.RUNTIME, "LD_PRELOAD"),
        "LD_LIBRARY_PATH": before(folder, "LD_LIBRARY_PATH"),
        "BATON_STUB_MEMORY": str(gpu.memory),
        LIMIT: str(gpu.usable),
        "BATON_STUB_CAPABILITY": str(gpu.capability),
        "BATON_STUB_PROCESSORS": str(gpu.processors),
        "BATON_STUB_NAME": gpu.title,
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # of a context that is not there, of memory that is out
        _PLAYING: " ".join(found),
    }
