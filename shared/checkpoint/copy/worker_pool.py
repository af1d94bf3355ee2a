"""Writes files that are made of moves: several threads, one hash of each file, and a journal to go on from after a kill.

Reading, writing and hashing release the interpreter's lock. Blocks of a file are made in any order, and hashed and
written in the file's own, so that the bytes and hashes do not depend on the number of threads.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash

from shared.checkpoint.copy import blocks
from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.journal import Journal
from shared.checkpoint.copy.operations import Block, FilePlan
from shared.checkpoint.files import small_stacks, write_out

_WRITE_OUT = 64 << 20  # bytes of a file, after which the kernel is told to bring them to the disk
Advance = Callable[[int], None]
Task = Callable[[], None]


class _Stopped(Exception):  # noqa: N818 -- another thread failed
    pass


def write_files(
    directory: Path,
    files: Sequence[FilePlan],
    *,
    workers: int,
    advance: Advance = lambda amount: None,
    journal: Journal | None = None,
    tasks: Sequence[Task] = (),
) -> dict[str, str]:
    """Write the files; returns the content hash of each by name.

    Args:
        directory: where to; folders that names ask for are there.
        files: what to write.
        workers: threads.
        advance: told of bytes as they are written, or found written by an earlier run.
        journal: what an earlier run wrote, and where this one notes what it wrote.
        tasks: further work that is to be done by the time this returns, such as checks of what is read.

    Raises:
        Exception: the first one of a move or task, when all threads have ended.
    """
    _allow_files(len(files) + len(frozenset().union(*(file.sources for file in files))))
    pool = _WorkerPool(directory, files, advance, journal, tasks)
    threads = [threading.Thread(target=pool.work, name=f"copy-{n}", daemon=True) for n in range(workers)]
    try:
        with small_stacks():
            for thread in threads:
                thread.start()
            pool.disk.submit(int).result()  # starts its thread
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # a signal is served between two waits
    except BaseException:
        pool.stop()
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        pool.close()
    if pool.failure is not None:
        raise pool.failure
    return {output.file.name: output.digest for output in pool.outputs}


class _WorkerPool:
    """What the threads share."""

    def __init__(
        self,
        directory: Path,
        files: Sequence[FilePlan],
        advance: Advance,
        journal: Journal | None,
        tasks: Sequence[Task],
    ) -> None:
        self.failure: BaseException | None = None
        self.disk = ThreadPoolExecutor(1, "disk")  # brings to the disk what is written, while more is
        self.outputs = [
            _FileWriter(directory / file.name, file, journal, self._raise_if_stopped, self.disk) for file in files
        ]
        self._files = OpenFiles()
        self._advance = advance
        self._lock = threading.Lock()
        self._pending = list(reversed(self.outputs))
        self._started: list[_FileWriter] = []
        self._tasks = list(reversed(tasks))
        self._stop = False

    def work(self) -> None:
        """One thread: a file of its own while there is one, then a task, then a hand with files that others write."""
        buffer = memoryview(bytearray(blocks.BLOCK))
        try:
            while (step := self._next()) is not None:
                if not isinstance(step, _FileWriter):
                    step()
                    self._raise_if_stopped()
                    continue
                for amount in step.write(self._files, buffer):
                    with self._lock:
                        self._advance(amount)
                    self._raise_if_stopped()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 -- write_files raises it
            with self._lock:
                self.failure = self.failure or error
            self.stop()

    def _next(self) -> _FileWriter | Task | None:
        with self._lock:
            if self._pending:
                self._started.append(self._pending.pop())
                return self._started[-1]
            if self._tasks:
                return self._tasks.pop()
            self._started = [output for output in self._started if not output.exhausted]
            return self._started[0] if self._started else None

    def stop(self) -> None:
        self._stop = True
        for output in self.outputs:
            output.wake()

    def _raise_if_stopped(self) -> None:
        if self._stop:
            raise _Stopped

    def close(self) -> None:
        """Raises OSError where the disk did not take what was written."""
        self.disk.shutdown()
        self._files.close()
        for output in self.outputs:
            output.close()


class _FileWriter:
    """A file being written."""

    def __init__(
        self,
        path: Path,
        file: FilePlan,
        journal: Journal | None,
        check: Callable[[], None],
        disk: ThreadPoolExecutor,
    ) -> None:
        self.file = file
        self.digest = ""
        self.exhausted = False  # every block has been taken
        self._path, self._journal, self._check, self._disk = path, journal, check, disk
        self._sent = 0  # bytes that the kernel was told to bring to the disk
        self._flushed: Future[None] | None = None
        self._descriptor: int | None = None
        self._hash = xxhash.xxh3_128()
        self._take_lock = threading.Lock()
        self._turn = threading.Condition()
        self._numbered: Iterator[tuple[int, int, Block]] | None = None
        self._hashed = self._written = 0  # blocks

    def write(self, files: OpenFiles, buffer: memoryview) -> Iterator[int]:
        """Take blocks until there is none; yields the bytes of each."""
        while (taken := self._take()) is not None:
            if isinstance(taken, int):
                yield taken
                continue
            number, start, block = taken
            if block.size > len(buffer):
                buffer = memoryview(bytearray(block.size))
            data = buffer[: block.size]
            block.fill(files, data)
            self._write_in_turn(number, start, block, data)
            yield block.size

    def _take(self) -> tuple[int, int, Block] | int | None:
        with self._take_lock:
            if self._numbered is None:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
                resumed_bytes = (
                    self._journal.resume(self.file.name, self._descriptor, self._hash) if self._journal else 0
                )
                self._numbered = self._number(resumed_bytes)
                if resumed_bytes:
                    return resumed_bytes
            taken = next(self._numbered, None)
            self.exhausted = taken is None
            return taken

    def _number(self, resumed_bytes: int) -> Iterator[tuple[int, int, Block]]:
        start = number = 0
        for block in self.file.make_blocks():
            if start >= resumed_bytes:
                yield number, start, block
                number += 1
            start += block.size
        assert start == self.file.size, f"{self.file.name}: {start} bytes instead of {self.file.size}"
        if number == 0:
            self._finish()

    def _write_in_turn(self, number: int, start: int, block: Block, data: memoryview) -> None:
        """Seal and hash a block after all before it, and write it after all before it, while the next one is hashed.

        Two threads that write to one file wait for each other in the kernel, and busily; here they wait in peace, and
        the file grows at its end only.
        """
        self._wait(lambda: self._hashed == number)
        # only the thread whose turn it is comes here
        if block.finalize is not None:
            block.finalize(data)
        self._hash.update(data)
        digest = self._hash.hexdigest() if block.resumable else ""
        with self._turn:
            self._hashed += 1
            self._turn.notify_all()
        self._wait(lambda: self._written == number)
        self._put(data, start)
        self._note(start + block.size, digest)
        with self._turn:
            self._written += 1
            self._turn.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._turn:
            while not ready():
                self._check()  # before waiting: who stops says so first, and wakes those that wait after that
                self._turn.wait()

    def _put(self, data: memoryview, start: int) -> None:
        assert self._descriptor is not None
        while len(data):
            count = os.pwrite(self._descriptor, data, start)
            data, start = data[count:], start + count

    def _note(self, end: int, digest: str) -> None:
        """Let the journal know how far the file is written, where a run can go on from there, and the disk."""
        assert self._descriptor is not None
        if digest and self._journal is not None:
            self._journal.note(self.file.name, end, digest, last=end == self.file.size)
        if end == self.file.size:
            self._finish()
        elif end - self._sent >= _WRITE_OUT:
            self._disk.submit(write_out, self._descriptor, self._sent, end - self._sent)
            self._sent = end

    def _finish(self) -> None:
        assert self._descriptor is not None
        self.digest = f"xxh3_128:{self._hash.hexdigest()}"
        self._flushed = self._disk.submit(_flush, self._descriptor)
        self._descriptor = None

    def wake(self) -> None:
        with self._turn:
            self._turn.notify_all()

    def close(self) -> None:
        """After `disk` has ended; OSError if the disk did not take the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        if self._flushed is not None:
            self._flushed.result()


def _flush(descriptor: int) -> None:
    """A whole file's last step: it is on the disk."""
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _allow_files(count: int) -> None:
    """Let this process have as many files open; large models come in more than the usual limit of 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        ceiling = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))
