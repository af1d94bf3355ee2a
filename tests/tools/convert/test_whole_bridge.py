"""Directories that Megatron-Bridge wrote come back as their source, and those of `to-megatron` are read by it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

WEIGHTS = "model.safetensors"
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "megatron-bridge"  # made by tests/golden/make_bridge.py
FAMILIES = ("llama", "qwen3")


def bridge(*words: str | Path) -> str:
    """What the worker prints."""
    command = [sys.executable, Path(__file__).with_name("bridge_worker.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def comes_back(convert: Any, source: Path, hf: Path, target: Path) -> None:
    answer = convert("to-hf", "--source", source, "--hf-files", hf, "--target", target)
    assert answer.code == 0, answer.err
    assert (target / WEIGHTS).read_bytes() == (hf / WEIGHTS).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_bridge_wrote_comes_back_byte_for_byte(family: str, convert: Any, tmp_path: Path) -> None:
    comes_back(convert, GOLDEN / family / "megatron", GOLDEN / family / "hf", tmp_path / "hf")


def test_inspect_names_bridge(convert: Any) -> None:
    answer = convert("inspect", GOLDEN / "llama" / "megatron", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert (found["kind"], found["iteration"]) == ("megatron", "iter_0000000")
    assert found["made_by"] == "Megatron-Bridge (no manifest.json)"


@pytest.mark.skipif(find_spec("megatron.bridge") is None, reason="megatron.bridge (Megatron-Bridge) is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_bridge_as_it_is_installed(family: str, convert: Any, tmp_path: Path) -> None:
    hf = GOLDEN / family / "hf"
    bridge("import", hf, tmp_path / "bridges")
    comes_back(convert, tmp_path / "bridges", hf, tmp_path / "back")
    assert convert("to-megatron", "--source", hf, "--target", tmp_path / "ours").code == 0
    said = bridge("export", tmp_path / "ours", hf, tmp_path / "exported")
    assert float(said.split()[-1]) < 1e-5  # in fp32, logits over the largest of them
    wanted, found = load_file(hf / WEIGHTS), load_file(tmp_path / "exported" / WEIGHTS)
    assert wanted.keys() == found.keys()
    assert all((found[name] == tensor.to(found[name].dtype)).all() for name, tensor in wanted.items())
