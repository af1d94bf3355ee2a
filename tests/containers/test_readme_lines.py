"""The container commands of README.md, run verbatim in a user's directory."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.usefixtures("images")


def shell(script: str, here: Path) -> str:
    done = subprocess.run(["bash", "-euc", script], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_lines_of_the_page_run_and_the_files_are_the_callers(tmp_path: Path) -> None:
    (function,) = re.findall(r"^baton\(\) \{\n.*?^\}\n", TEXT, re.MULTILINE | re.DOTALL)
    (line,) = re.findall(r"^docker run .* convert to-megatron .*$", TEXT, re.MULTILINE)
    assert "llama-5m" in shell(f"{function}baton convert families", tmp_path)
    shell(f"{function}baton convert init --size llama-5m --target hf", tmp_path)
    shell(line, tmp_path)
    assert "megatron" in shell(f"{function}baton convert inspect mg", tmp_path)
    shell(f"{function}baton --memory 4g convert:latest to-hf --source mg --target back", tmp_path)
    for name in ("hf", "mg", "back"):
        assert {path.stat().st_uid for path in [tmp_path / name, *(tmp_path / name).rglob("*")]} == {os.getuid()}
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()
