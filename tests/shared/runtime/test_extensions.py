from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from megatron.core.tensor_parallel import random

from shared.errors import UserError
from shared.runtime.extensions import compile_share_storage


def test_a_lock_that_a_killed_process_left_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "baton" / "share_storage_ext" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    others = tmp_path / "share_storage_ext" / "lock"  # of another program, which may be compiling
    others.parent.mkdir()
    others.touch()
    found = []

    def compiled() -> None:
        with (tmp_path / "baton" / "flock").open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found.append(lock.exists())

    monkeypatch.setattr(random, "_get_share_storage", compiled)
    compile_share_storage()
    compile_share_storage()  # in the same folder
    assert found == [False, False]
    assert others.exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()].count("baton") == 1
    assert not (tmp_path / "baton" / "baton").exists()


def test_without_a_compiler_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("Ninja is required to load C++ extensions (pip install ninja to get it)\nmore")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(random, "_get_share_storage", fails)
    with pytest.raises(
        UserError, match=r"mla_up_proj: a C\+\+ function .* \(Ninja is required .*\); install g\+\+ and ninja"
    ):
        compile_share_storage()
