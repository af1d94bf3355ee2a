"""A forked process that writes this rank's part of a checkpoint while training goes on.

Megatron-Core's callers of its asynchronous saves start a process that outlives a killed trainer, or one that imports the
main script again. This one dies with the trainer, hashes what it has written, and hands its results over in a file without
a name.

The fork's memory is a snapshot: pages that training changes are copied. A forked child of a process with threads (gloo,
OpenMP) may not take locks which those held: it writes files, computes hashes and ends.
"""

from __future__ import annotations

import errno
import gc
import os
import pickle
import select
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from shared.checkpoint.directory.manifest import FileEntry
from shared.checkpoint.directory.publish import file_entries
from shared.console import log
from shared.runtime.launch import FORWARDED
from shared.runtime.parent_death import die_with_parent

_BEGIN = 30  # seconds; milliseconds are usual


class BackgroundWriter:
    """Writes one request. Every rank has its own.

    Args:
        request: from `state.describe`; its tensors must not be changed in place on a GPU before the constructor returns.
        directory: of the checkpoint.
    """

    def __init__(self, request: AsyncRequest, directory: Path) -> None:
        self.entries: dict[str, FileEntry] = {}  # size and hash of this rank's file, once it has ended
        self._process: int | None = None
        if request.async_fn is None:  # this rank has nothing to write
            return
        rank, buckets, self._results = request.async_fn_args
        self._buckets = request.preload_fn() if request.preload_fn else buckets  # kept: the fork reads pinned memory
        self._function, self._rank = request.async_fn, rank
        self._outcome = os.memfd_create("written")
        try:
            self._process = self._fork(directory)
        except OSError as error:
            log(f"rank {rank}: no process for the save ({error.strerror}); it is written before training goes on")
            self._write(directory)
            self._collect(0)

    def _fork(self, directory: Path) -> int:
        """The process's id, once it has begun. OSError if there is none, or it stands still."""
        parent = os.getpid()
        begun, begins = os.pipe()
        collects = gc.isenabled()
        gc.disable()  # before the fork: the child may not destroy the trainer's objects, some of which join threads it lacks
        process = -1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads: see the module's text
                process = os.fork()
        finally:
            if process:
                os.close(begins)
                if collects:
                    gc.enable()
                if process < 0:
                    os.close(begun)
        if process:
            _await(process, begun)
            return process
        status = 0
        try:
            die_with_parent(parent)
            for number in FORWARDED:  # the trainer decides what they mean
                signal.signal(number, signal.SIG_IGN)
            torch.set_num_threads(1)
            os.write(begins, b".")
            self._write(directory)
        except BaseException as error:  # noqa: BLE001 -- no exception may reach the training loop's code
            status = 1
            os.ftruncate(self._outcome, 0)
            os.pwrite(self._outcome, pickle.dumps((RuntimeError(str(error)), {})), 0)
            status = 0
        finally:
            os._exit(status)

    def _write(self, directory: Path) -> None:
        """Write and hash the file; the results go to the file without a name."""
        self._function(self._rank, self._buckets, self._results)
        written = self._results.get_nowait()
        entries = {}
        if not isinstance(written, Exception):
            entries = file_entries(directory, [Path(name) for name, *_ in self._buckets])
        with os.fdopen(os.dup(self._outcome), "wb") as file:
            pickle.dump((written, entries), file)

    def ended(self) -> bool:
        """Whether this rank has written, or failed."""
        if self._process is None:
            return True
        process, status = os.waitpid(self._process, os.WNOHANG)
        if not process:
            return False
        self._process = None
        self._collect(status)
        return True

    def _collect(self, status: int) -> None:
        """Hand the results to Megatron-Core, which looks for them in its own queue."""
        written: Any
        if status:
            code = os.waitstatus_to_exitcode(status)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            written = RuntimeError(f"the process that wrote it {how}; if nobody sent a signal, memory ran out")
        else:
            os.lseek(self._outcome, 0, os.SEEK_SET)
            with os.fdopen(os.dup(self._outcome), "rb") as file:
                written, self.entries = pickle.load(file)  # noqa: S301 -- written by a fork of this process
        os.close(self._outcome)
        self._results.put(written)
        del self._buckets

    def kill(self) -> None:
        """End the process, whatever it has written."""
        if self._process is not None:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            self._process = None


def _await(process: int, begun: int) -> None:
    """Wait for its first sign, or its end. One that stands still waits for a lock that a thread held at the fork."""
    with os.fdopen(begun, "rb") as sign:
        if select.select([sign], [], [], _BEGIN)[0]:
            return
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise TimeoutError(errno.ETIMEDOUT, f"it stood still for {_BEGIN} s")
