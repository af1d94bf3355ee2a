"""Walks of a directory, and entries that are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.checkpoint.files import files_below
from shared.errors import UserError


def test_links_are_followed_and_folders_left_out(tmp_path: Path) -> None:
    for name in ("a/b/1", "a/2", ".git/3", "elsewhere/4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "0").symlink_to(tmp_path / "elsewhere" / "4")
    names = [path.relative_to(tmp_path).as_posix() for path in files_below(tmp_path, {".git"})]
    assert names == ["a/0", "a/2", "a/b/1", "a/link/4", "elsewhere/4"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.symlink_to("nothing"), "odd is a dangling link"),
        (lambda path: path.symlink_to("."), "odd is a circular link"),
        (lambda path: path.symlink_to(path), "odd is a dangling link"),
        (os.mkfifo, "odd is neither a file nor a directory"),
        (lambda path: Path(os.fsdecode(os.fsencode(path) + b"\xff")).touch(), "odd.* has a name that is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    (tmp_path / "folder").mkdir()
    make(tmp_path / "folder" / "odd")
    with pytest.raises(UserError, match=says):
        list(files_below(tmp_path))
