"""Recording of proofs: each outcome independent of the others."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from shared.families import registry
from tools.convert.proofs import code, description

HERE = Path(__file__).parent
merge = runpy.run_path(str(HERE / "record_proofs.py"))["merge"]
TESTS = """
import pytest

def test_a(proof):
    with proof("logits", size="tiny") as figures:
        figures["difference"] = 1.5e-7

def test_b(proof):
    with proof("mistakes", size="tiny") as figures:
        figures["caught"] = 3
        assert 1 == 2, "one is two"

def test_c(proof):
    with proof("vllm", size="tiny"):
        pytest.skip("no such class")

def test_d():
    raise RuntimeError("has nothing to do with proofs and is not run")
"""


def test_each_proof_is_recorded_as_it_ended(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_bytes((HERE / "conftest.py").read_bytes())
    (tmp_path / "proofs").mkdir()
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", tmp_path]
    environment = os.environ | {"PROOFS": str(tmp_path / "proofs")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 1 passed, 1 skipped, 1 deselected" in done.stdout, done.stdout
    (file,) = (tmp_path / "proofs").iterdir()
    versions, *lines = map(json.loads, file.read_text().splitlines())
    assert versions["tool"] == "convert"
    assert {"torch", "transformers", "megatron-core"} <= versions["versions"].keys()
    assert lines == [
        {"proof": "logits", "size": "tiny", "result": "proven", "difference": 1.5e-7},
        {"proof": "mistakes", "size": "tiny", "result": "failed", "reason": "one is two", "caught": 3},
        {"proof": "vllm", "size": "tiny", "result": "lacking", "reason": "no such class"},
    ]


def line(proof: str, result: str, **more: Any) -> dict[str, Any]:
    return {"proof": proof, "size": "gemma-tiny", "result": result, **more}


def test_families_that_were_run_are_replaced_and_others_stay() -> None:
    tool = {"tool": "convert", "versions": {"torch": "1"}}
    before = merge(
        [tool, line("logits", "proven"), line("vllm", "proven", tokens=5)], {"runs": {}, "families": {}}, "d", "r"
    )
    both = merge([tool, {**line("logits", "proven"), "size": "glm-tiny"}], before, "later", "s")
    assert set(both["families"]) == {"gemma", "glm"}
    assert both["runs"]["d r"] == {
        "date": "d",
        "revision": "r",
        "code": code(),
        "versions": {"convert": {"torch": "1"}},
    }
    again = merge([tool, line("logits", "proven", difference=1.23456e-7)], both, "last", "t")
    entry = again["families"]["gemma"]
    assert entry["sizes"] == {"gemma-tiny": {"logits": {"result": "proven", "difference": 1.2e-7}}}
    assert entry["description"] == description(registry.FAMILIES["gemma"])
    assert set(again["runs"]) == {"later s", "last t"}


def test_of_two_outcomes_the_worse_one_counts() -> None:
    lines = [line("logits", "failed"), line("logits", "proven"), line("vllm", "lacking"), line("vllm", "proven")]
    for given in (lines, lines[::-1]):
        sizes = merge(given, {"runs": {}, "families": {}}, "d", "r")["families"]["gemma"]["sizes"]
        assert {proof: found["result"] for proof, found in sizes["gemma-tiny"].items()} == {
            "logits": "failed",
            "vllm": "lacking",
        }


def test_published_models_are_kept_with_their_family_alone() -> None:
    models = [
        {"proof": "tensors", "family": family, "model": f"a {family}", "result": "proven", "tensors": 7}
        for family in ("gemma", "glm")
    ]
    found = merge([line("logits", "proven"), *models], {"runs": {}, "families": {}}, "d", "r")["families"]
    assert set(found) == {"gemma"}
    assert found["gemma"]["published"] == {"a gemma": {"result": "proven", "tensors": 7}}
