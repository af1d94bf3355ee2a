"""Files that survive a kill: content hashes, fsync, atomic replacement."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from shared.errors import UserError

_BLOCK = 1 << 20  # bytes read at a time while hashing
_HASH_WORKERS = 4  # xxhash releases the interpreter lock, so threads are enough
_WRITE_OUT = 2  # SYNC_FILE_RANGE_WRITE, linux/fs.h
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def small_stacks() -> Iterator[None]:
    """Threads that begin in the block have stacks of a megabyte: a limit of a process's memory counts them in full."""
    usual = threading.stack_size(1 << 20)
    try:
        yield
    finally:
        threading.stack_size(usual)


def hash_file(path: Path, advance: Callable[[int], None] = lambda amount: None) -> str:
    """`xxh3_128:<hex>` of a file's content, read in blocks; calls `advance(bytes)` on the way.

    xxHash3 runs at the speed of memory: it finds damage, it is no proof against forgery.
    """
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return f"xxh3_128:{digest.hexdigest()}"


def hash_bytes(content: bytes) -> str:
    """As `hash_file`, of bytes at hand."""
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"


def hash_files(paths: Iterable[Path], advance: Callable[[int], None] = lambda amount: None) -> list[str]:
    """`hash_file` of each path, several at a time, in order."""
    with small_stacks(), ThreadPoolExecutor(_HASH_WORKERS) as pool:
        return list(pool.map(lambda path: hash_file(path, advance), paths))


def files_below(root: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """Every file below a directory, links followed, in a fixed order; folders called as one of `without` left out.

    Raises:
        UserError: a link that leads nowhere or back, what is no file, a name that is not UTF-8.
    """
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name not in without)
        for path in (Path(folder, name) for name in (*folders, *sorted(names))):
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path} is a link to nothing; fetch that file again, or remove the link")
            if path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
                raise UserError(f"{path} is a link to a folder that it lies in; remove it")
            if not (path.is_file() or path.is_dir()):
                raise UserError(f"{path} is neither a file nor a folder; move it away")
            if str(path) != os.fsencode(path).decode(errors="replace"):
                raise UserError(f"{os.fsencode(path)!r} has a name that is not UTF-8; rename it")
        yield from (Path(folder, name) for name in sorted(names))


def sync_tree(root: Path) -> None:
    """fsync every file below `root`, then every folder, `root` last."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def write_out(descriptor: int, start: int, size: int) -> None:
    """Let the kernel begin to bring a range of a file to the disk, so that a later fsync finds less to do."""
    begin = ctypes.CDLL(None, use_errno=True).sync_file_range
    begin.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    begin(descriptor, start, size, _WRITE_OUT)  # what fails here, fsync reports


def sync(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content whole: a reader, or a kill, sees the old or the new."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step; False where the file system cannot."""
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def remove_tree(path: Path) -> None:
    """Remove a directory that another process may be removing as well."""
    shutil.rmtree(path, onexc=_unless_gone)


def _unless_gone(function: Callable[..., object], path: str, error: BaseException) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
