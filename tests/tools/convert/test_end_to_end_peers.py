"""Directories of Megatron-Bridge, mbridge and mcore-bridge are exported as their source; they read those of `to-megatron`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shared.families import registry
from tests.tools.convert.conftest import write_hf

WEIGHTS = "model.safetensors"
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "megatron-bridge"  # made by tests/golden/make_bridge.py
FAMILIES = ("llama", "qwen3")
PEERS = Path(__file__).resolve().parents[2] / "peers"
PYTHON = PEERS / ".venv" / "bin" / "python"
peers = pytest.mark.skipif(
    not PYTHON.exists(), reason="Megatron-Bridge, mbridge and mcore-bridge are not installed: make peers"
)


def peer(program: str, *words: str | Path) -> str:
    """What a program in the peers' environment prints."""
    command = [PYTHON, PEERS / program, *words]
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


@peers
@pytest.mark.parametrize("program", ["by_bridge.py", "by_mbridge.py", "by_mcore_bridge.py"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
def test_peers_as_they_are_installed(family: str, program: str, convert: Any, tmp_path: Path) -> None:
    hf = (
        write_hf(tmp_path / "hf", registry.sizes()["qwen3-moe-tiny"])
        if family == "qwen3_moe"
        else GOLDEN / family / "hf"
    )
    peer(program, "to-megatron", hf, tmp_path / "theirs")
    comes_back(convert, tmp_path / "theirs", hf, tmp_path / "back")
    assert convert("to-megatron", "--source", hf, "--target", tmp_path / "ours").code == 0
    peer(program, "to-hf", tmp_path / "ours", hf, tmp_path / "exported")
    same(hf, tmp_path / "exported")


@peers
@pytest.mark.parametrize("family", FAMILIES)
def test_bridges_model_of_our_directory_computes_the_same(family: str, convert: Any, tmp_path: Path) -> None:
    hf = GOLDEN / family / "hf"
    assert convert("to-megatron", "--source", hf, "--target", tmp_path / "ours").code == 0
    said = peer("by_bridge.py", "compare", tmp_path / "ours", hf, tmp_path / "exported")
    assert float(said.split()[-1]) < 1e-5  # in fp32, logits over the largest of them
    same(hf, tmp_path / "exported")


def same(hf: Path, exported: Path) -> None:
    """Tensors are equal, in a type that holds them."""
    wanted, found = load_file(hf / WEIGHTS), load_file(exported / WEIGHTS)
    assert wanted.keys() == found.keys()
    assert all((found[name] == tensor.to(found[name].dtype)).all() for name, tensor in wanted.items())
