"""File system helpers: content hashes, fsync, atomic replacement, directory walks."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
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
_LFS_BYTES = 1024  # a pointer is smaller: docs/spec.md of git-lfs
_LFS_POINTER = re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/v\d")  # hawser: its first name
# Answers of a server saved under a file's name, as `curl` and `wget` do: a page, or the hub's error in plain text.
_ANSWER = re.compile(
    rb"\s*<(!doctype )?html\b|(entry|repository|revision) not found|invalid username or password", re.I
)
_NEVER_A_PAGE = (".json", ".model", ".tiktoken", ".safetensors", ".bin")


@contextlib.contextmanager
def small_stacks() -> Iterator[None]:
    """Context manager: new threads have 1 MiB stacks. Limits of virtual memory count stacks in full."""
    usual = threading.stack_size(1 << 20)
    try:
        yield
    finally:
        threading.stack_size(usual)


def hash_file(path: Path, advance: Callable[[int], None] = lambda amount: None) -> str:
    """`xxh3_128:<hex>` of a file's content; calls `advance(bytes)` during reading.

    xxHash3 runs at memory speed. It detects damage, not forgery.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        size = max(
            os.fstat(file.fileno()).st_size, 4096
        )  # a buffer is filled with zeros first: a small one for a small file
        buffer = memoryview(bytearray(min(size, _BLOCK)))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return f"xxh3_128:{digest.hexdigest()}"


def hash_bytes(content: bytes) -> str:
    """`hash_file` of bytes in memory."""
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"


def hash_files(paths: Iterable[Path], advance: Callable[[int], None] = lambda amount: None) -> list[str]:
    """`hash_file` of each path, on several threads, in order."""
    with small_stacks(), ThreadPoolExecutor(_HASH_WORKERS) as pool:
        return list(pool.map(lambda path: hash_file(path, advance), paths))


def check_not_stand_in(path: Path, flag: str = "") -> None:
    """UserError if a file holds something else in its place: a git-lfs pointer, or a server's error page."""
    named = f"{flag} {path}".lstrip()
    with path.open("rb") as file:
        start = file.read(_LFS_BYTES)
    if len(start) < _LFS_BYTES and _LFS_POINTER.match(start):
        raise UserError(
            f"{named} is a git-lfs pointer, not the file; run `git lfs pull` in its repository, or fetch it again"
        )
    if path.suffix in _NEVER_A_PAGE and _ANSWER.match(start):
        raise UserError(f"{named} is the answer of a web server, not the file; fetch it again")


def files_below(root: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """Every file below a directory, sorted, links followed, folders named in `without` skipped.

    Raises:
        UserError: a dangling or circular link, a special file (socket, device), a name that is not UTF-8.
    """
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name not in without)
        for path in (Path(folder, name) for name in (*folders, *sorted(names))):
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path} is a dangling link; fetch that file again, or remove the link")
            if path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
                raise UserError(f"{path} is a circular link, to a folder above it; remove it")
            if not (path.is_file() or path.is_dir()):
                raise UserError(f"{path} is neither a file nor a directory; move it away")
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
    """Start write-back of a file's range; shortens a later fsync."""
    begin = ctypes.CDLL(None, use_errno=True).sync_file_range
    begin.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    begin(descriptor, start, size, _WRITE_OUT)  # errors are left to fsync


def sync(path: Path) -> None:
    """fsync one file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content atomically: readers see the old or the new content, also after a kill."""
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


def commit_directory(partial: Path, final: Path) -> None:
    """fsync a directory and rename it to `final`, in the same parent; replaces an existing `final`."""
    sync_tree(partial)
    if final.exists():
        remove_tree(final)
    partial.rename(final)
    sync(final.parent)


def exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically (RENAME_EXCHANGE). False if the file system cannot."""
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def remove_tree(path: Path) -> None:
    """Remove a directory. Files already removed by another process are no error."""
    shutil.rmtree(path, onexc=_unless_gone)


def _unless_gone(function: Callable[..., object], path: str, error: BaseException) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
