"""`convert verify` of runs with LoRA: what comes back, and what is found to be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tools.convert.test_to_peft import Published, make_run
from tools.convert.cli import tool

CASES = ("qwen3_moe", "some")  # experts, and a scale of its own


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, write_architecture: Any) -> dict[str, Published]:
    folder = tmp_path_factory.mktemp("runs")
    return {case: make_run(case, folder / case, write_architecture, tool) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_a_run_and_its_adapter_are_equal(published: Any, convert: Any, tmp_path: Path, case: str) -> None:
    made, certificate = published[case], tmp_path / "certificate.json"
    words = ("--source", made.adapter, "--target", made.run, "--certificate", certificate)
    answer = convert("verify", *words)
    assert answer.code == 0, answer.err
    assert "files come back bit for bit; logits over 512 positions differ by at most" in answer.out
    found = json.loads(certificate.read_text())
    manifest = json.loads((made.adapter / "manifest.json").read_text())
    assert (found["passed"], found["tensors"]) == (True, manifest["facts"]["tensors"])
    assert found["logits"]["passed"]
    assert "no manifest says" not in answer.err


def changed(published: dict[str, Published], folder: Path, **config: Any) -> Path:
    """A copy of an adapter without its manifest, at a place from which its base is found."""
    made = published["some"]
    adapter = shutil.copytree(made.adapter, folder / "adapter")
    (adapter / "manifest.json").unlink()
    fields = json.loads((adapter / "adapter_config.json").read_text())
    fields |= {"base_model_name_or_path": str(made.base)} | config
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    return adapter


def test_differences_are_found(published: dict[str, Published], convert: Any, tmp_path: Path) -> None:
    made = published["some"]
    words = ("--target", made.run, "--certificate", tmp_path / "certificate.json", "--no-logits")
    adapter = changed(published, tmp_path)
    assert convert("verify", "--source", adapter, *words).code == 0
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    answer = convert("verify", "--source", adapter, *words)
    assert answer.code == 1
    assert "v_proj.lora_B.weight differs" in answer.err
    weights.write_bytes(content)
    (adapter / "tokenizer.json").unlink()
    assert "tokenizer.json differs" in convert("verify", "--source", adapter, *words).err
    shutil.rmtree(adapter)
    answer = convert("verify", "--source", changed(published, tmp_path, lora_alpha=5), *words)
    assert "adapter_config.json: lora_alpha is 5 instead of 6" in answer.err


def test_logits_of_another_scale_differ(
    published: dict[str, Published], convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter whose settings, alone, are not what the run computed with."""
    from shared.mapping.adapters import LoraSettings

    made = published["some"]
    monkeypatch.setattr(LoraSettings, "scale", property(lambda self: 1.01 * self.alpha / self.rank**0.5))
    answer = convert("verify", "--source", made.adapter, "--target", made.run, "--certificate", tmp_path / "c.json")
    assert answer.code == 1
    assert "logits differ by" in answer.err


def test_what_cannot_be_compared_is_refused(published: dict[str, Published], convert: Any, tmp_path: Path) -> None:
    made = published["some"]
    answer = convert("verify", "--source", made.base, "--target", made.run)
    assert answer.code == 2
    assert f"--source {made.base} has no adapter_config.json; --target {made.run} holds LoRA adapters" in answer.err
    answer = convert("verify", "--source", made.adapter, "--target", made.run, "--hf-files", made.base)
    assert answer.code == 2
    assert "--hf-files belongs to models" in answer.err
    run = shutil.copytree(made.run, tmp_path / "elsewhere" / "run")
    answer = convert("verify", "--source", made.adapter, "--target", run)
    assert answer.code == 2
    assert "which is missing; restore it, or give --no-logits" in answer.err
    assert not list(tmp_path.glob("**/*certificate.json"))
