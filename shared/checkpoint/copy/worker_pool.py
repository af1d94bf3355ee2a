"""The worker pool: writes files from copy operations on several threads, hashes them, and journals for a resume.

Reading, writing and hashing release the GIL. The blocks of a file are filled in any order, then hashed and written in
file order: bytes and hashes do not depend on the number of threads.
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

_WRITE_OUT = 64 << 20  # bytes of a file between two starts of write-back
Advance = Callable[[int], None]
Task = Callable[[], None]


class _Stopped(Exception):  # noqa: N818 -- control flow: another thread failed
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
    """Write the files. Returns the content hash of each by name.

    Args:
        directory: output directory; the folders in the files' names exist.
        files: the files to write.
        workers: threads.
        advance: called with the number of bytes written or resumed.
        journal: records written prefixes and resumes those of an earlier run.
        tasks: other work for the threads, such as hash checks of the sources.

    Raises:
        Exception: the first error of an operation or a task, after all threads have ended.
    """
    _allow_files(len(files) + len(frozenset().union(*(file.sources for file in files))))
    pool = _WorkerPool(directory, files, advance, journal, tasks)
    threads = [threading.Thread(target=pool.work, name=f"copy-{n}", daemon=True) for n in range(workers)]
    try:
        with small_stacks():
            for thread in threads:
                thread.start()
            pool.disk.submit(int).result()  # starts its thread, with a small stack
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # Python runs signal handlers between two waits
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
    """State shared by the threads."""

    def __init__(
        self,
        directory: Path,
        files: Sequence[FilePlan],
        advance: Advance,
        journal: Journal | None,
        tasks: Sequence[Task],
    ) -> None:
        self.failure: BaseException | None = None
        self.disk = ThreadPoolExecutor(1, "disk")  # write-back and fsync, concurrent with writing
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
        """Body of one thread: pending files first, then tasks, then blocks of other threads' files."""
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
        """Release everything. Raises OSError if write-back or fsync failed."""
        self.disk.shutdown()
        self._files.close()
        for output in self.outputs:
            output.close()


class _FileWriter:
    """One output file being written."""

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
        self.exhausted = False  # all blocks taken
        self._path, self._journal, self._raise_if_stopped, self._disk = path, journal, check, disk
        self._sent = 0  # bytes whose write-back was started
        self._flushed: Future[None] | None = None
        self._descriptor: int | None = None
        self._hash = xxhash.xxh3_128()
        self._take_lock = threading.Lock()
        self._turn = threading.Condition()
        self._blocks: Iterator[tuple[int, int, Block]] | None = None
        self._hashed = self._written = 0  # blocks

    def write(self, files: OpenFiles, buffer: memoryview) -> Iterator[int]:
        """Write blocks until none is left; yields the size of each."""
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
            if self._blocks is None:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
                resumed_bytes = (
                    self._journal.resume(self.file.name, self._descriptor, self._hash) if self._journal else 0
                )
                self._blocks = self._number_blocks(resumed_bytes)
                if resumed_bytes:
                    return resumed_bytes
            taken = next(self._blocks, None)
            self.exhausted = taken is None
            return taken

    def _number_blocks(self, resumed_bytes: int) -> Iterator[tuple[int, int, Block]]:
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
        """Finalize and hash a block in file order, then write it in file order. The next block is hashed meanwhile.

        Concurrent writes to one file spin on its kernel lock; waiting here uses no CPU. The file grows only at its end.
        """
        self._wait(lambda: self._hashed == number)
        # One thread at a time from here.
        if block.finalize is not None:
            block.finalize(data)
        self._hash.update(data)
        digest = self._hash.hexdigest() if block.resumable else ""
        with self._turn:
            self._hashed += 1
            self._turn.notify_all()
        self._wait(lambda: self._written == number)
        self._put(data, start)
        self._record_progress(start + block.size, digest)
        with self._turn:
            self._written += 1
            self._turn.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._turn:
            while not ready():
                self._raise_if_stopped()  # before each wait: `stop` sets the flag, then notifies
                self._turn.wait()

    def _put(self, data: memoryview, start: int) -> None:
        assert self._descriptor is not None
        while len(data):
            count = os.pwrite(self._descriptor, data, start)
            data, start = data[count:], start + count

    def _record_progress(self, end: int, digest: str) -> None:
        """Record progress in the journal if a later run can resume here; start write-back."""
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
        """Close the file, after shutdown of `disk`. OSError if its fsync failed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        if self._flushed is not None:
            self._flushed.result()


def _flush(descriptor: int) -> None:
    """fsync and close a complete file."""
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _allow_files(count: int) -> None:
    """Raise RLIMIT_NOFILE; large models exceed the usual 1024 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 64
    if soft != resource.RLIM_INFINITY and soft < needed:
        ceiling = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))
