"""Directories of every released contract version, in tests/golden, stay readable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.checkpoint.directory.manifest import CONTRACT_VERSION, MANIFEST
from shared.checkpoint.directory.open import open_checkpoint
from shared.errors import UserError

GOLDEN = Path(__file__).resolve().parents[3] / "tests" / "golden"
CONTRACTS = sorted(GOLDEN.glob("contract-*"))
# Version 2 is of LoRA adapters; all else is still written as version 1.
ADAPTERS = CONTRACTS[1]
ADAPTER_KINDS = {"adapter": "adapter", "adapter-run": "megatron"}
KINDS = {"tokenizer": "tokenizer", "hf": "hf", "megatron": "megatron", "dataset": "dataset", "conversations": "dataset"}


def hashes(directory: Path) -> dict[str, str]:
    files = json.loads((directory / MANIFEST).read_text())["files"]
    return {name: entry["hash"] for name, entry in files.items()}


def test_every_contract_has_golden_directories() -> None:
    assert [path.name for path in CONTRACTS] == [f"contract-{n}" for n in range(1, CONTRACT_VERSION + 1)]
    for contract in CONTRACTS:
        assert {path.name for path in contract.iterdir()} == set(ADAPTER_KINDS if contract == ADAPTERS else KINDS)
        for path in contract.iterdir():
            assert f"contract-{json.loads((path / MANIFEST).read_text())['contract_version']}" == contract.name


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("contract", CONTRACTS[:1], ids=lambda path: path.name)
def test_every_kind_is_read(contract: Path, name: str) -> None:
    found = open_checkpoint(contract / name, kinds=(KINDS[name],), flag="--source")  # type: ignore[arg-type]
    assert found.manifest is not None
    assert found.kind == KINDS[name]
    assert (found.hf_files / "tokenizer.json").is_file()


@pytest.mark.parametrize("contract", CONTRACTS[:1], ids=lambda path: path.name)
def test_old_weights_come_back_bit_for_bit(contract: Path, convert: Any, tmp_path: Path) -> None:
    answer = convert("to-hf", "--source", contract / "megatron", "--target", tmp_path / "hf")
    assert answer.code == 0, answer.err
    assert hashes(tmp_path / "hf") == hashes(contract / "hf")
    answer = convert("to-megatron", "--source", contract / "hf", "--target", tmp_path / "megatron")
    assert answer.code == 0, answer.err
    for megatron in (contract / "megatron", tmp_path / "megatron"):
        words = ("--source", contract / "hf", "--target", megatron, "--certificate", tmp_path / "certificate.json")
        answer = convert("verify", *words, "--no-logits")
        assert answer.code == 0, answer.err


@pytest.mark.parametrize("name", ADAPTER_KINDS)
def test_adapters_are_read_and_refused_by_name_by_readers_of_version_1(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = ADAPTER_KINDS[name]
    found = open_checkpoint(ADAPTERS / name, kinds=(kind,), flag="--source", adapters=True)  # type: ignore[arg-type]
    assert (found.kind, (found.hf_files / "tokenizer.json").is_file()) == (kind, True)
    monkeypatch.setattr("shared.checkpoint.directory.manifest.CONTRACT_VERSION", 1)
    with pytest.raises(UserError, match="has contract_version 2, and this tool reads 1; upgrade this tool"):
        open_checkpoint(ADAPTERS / name, kinds=(kind,), flag="--source")  # type: ignore[arg-type]


def test_an_old_adapter_run_is_published_bit_for_bit(convert: Any, tmp_path: Path) -> None:
    words = ("--source", ADAPTERS / "adapter-run", "--base", CONTRACTS[0] / "hf", "--target", tmp_path / "adapter")
    answer = convert("to-hf", *words)
    assert answer.code == 0, answer.err
    name = "adapter_model.safetensors"
    assert hashes(tmp_path / "adapter")[name] == hashes(ADAPTERS / "adapter")[name]


@pytest.mark.parametrize("name", KINDS)
def test_a_newer_contract_is_refused_by_name(name: str, tmp_path: Path) -> None:
    newer = tmp_path / "from-the-future"
    shutil.copytree(CONTRACTS[0] / name, newer)
    manifest = json.loads((newer / MANIFEST).read_text())
    manifest["contract_version"] = CONTRACT_VERSION + 1
    manifest["field_of_the_future"] = {}
    (newer / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError) as refused:
        open_checkpoint(newer, kinds=(KINDS[name],), flag="--source")  # type: ignore[arg-type]
    said = str(refused.value)
    assert f"--source {newer}" in said
    assert f"has contract_version {CONTRACT_VERSION + 1}" in said
    assert f"this tool reads {CONTRACT_VERSION}" in said
    assert "upgrade this tool to the version in its manifest.json" in said
