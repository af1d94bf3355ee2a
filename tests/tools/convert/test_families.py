"""The table of families and their proofs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from shared.families import registry
from tools.convert import families, proofs
from tools.convert.proofs import Record


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    """One in which everything is proven, to be changed by the test."""
    made: Record = {"runs": {"now": {"date": "now", "revision": "abc", "code": proofs.code(), "versions": {}}}}
    figures: dict[str, dict[str, Any]] = {"vllm": {"tokens": 24}, "mistakes": {"caught": 5, "of": 5}, "round trip": {}}
    figures["te round trip"] = {}
    made["families"] = {
        family.name: {
            "run": "now",
            "description": proofs.description(family),
            "sizes": {
                name: {
                    proof: {"result": "proven", **figures.get(proof, {"difference": 2e-7})}
                    for proof in proofs.proofs_of(size)
                }
                for name, size in proofs.tested_sizes(family).items()
            },
            "published": {"a model": {"result": "proven"}},
        }
        for family in registry.FAMILIES.values()
    }
    monkeypatch.setattr(proofs, "load", lambda: made)
    return made


@pytest.fixture
def row(convert: Any) -> Callable[[str], list[str]]:
    def cells(family: str) -> list[str]:
        (found,) = (
            line for line in convert("families", "--markdown").out.splitlines() if line.startswith(f"| {family} |")
        )
        return [cell.strip() for cell in found.split("|")[4:-1]]

    return cells


@pytest.mark.parametrize("width", [80, 160])
def test_every_family_and_size_is_listed_on_wide_and_narrow_terminals(
    width: int, convert: Any, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sized(families.Console):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"width": width})

    monkeypatch.setattr(families, "Console", Sized)
    answer = convert("families")
    assert answer.code == 0
    for name in (*registry.names(), *registry.sizes(), "qwen3-8b (8.19B)", "24 tokens", "abc"):
        assert name in " ".join(answer.out.split()), name
    assert max(map(len, answer.out.splitlines())) <= width
    assert "not run" not in answer.out


def test_a_proof_is_shown_as_it_ended(record: Record, row: Callable[[str], list[str]]) -> None:
    assert proofs.shortcomings(record) == []
    assert row("gemma") == ["equal", "equal", "2e-7", "2e-7", "2e-7", "-", "2e-7", "5 of 5", "24 tokens", "1"]
    sizes = record["families"]["gemma"]["sizes"]["gemma-tiny"]
    sizes["logits"]["difference"] = 3e-5
    sizes["logits pp2"] = {"result": "failed", "reason": "differs"}
    sizes["vllm"] = {"result": "lacking", "reason": "no class"}
    del sizes["mistakes"]
    assert row("gemma") == ["equal", "equal", "3e-5", "2e-7", "FAILED", "-", "2e-7", "not run", "not in vLLM", "1"]
    assert proofs.shortcomings(record) == ["gemma-tiny: logits pp2: failed: differs", "gemma-tiny: mistakes: not run"]


def test_the_worst_of_several_sizes_is_shown(record: Record, row: Callable[[str], list[str]]) -> None:
    sizes = record["families"]["qwen3_moe"]["sizes"]
    sizes["qwen3-moe-tiny"]["training ep2"]["difference"] = 7e-6
    sizes["qwen3-moe-tiny"]["vllm"] = {"result": "lacking", "reason": "no kernel"}
    assert row("qwen3_moe")[5:9] == ["2e-7", "7e-6", "10 of 10", "24 tokens (1 of 2 sizes)"]


def test_a_family_that_changed_or_came_later_is_not_proven(record: Record, row: Callable[[str], list[str]]) -> None:
    record["families"]["gemma"]["description"] = "of another time"
    del record["families"]["glm"]
    assert set(row("gemma")) == {"changed since"}
    assert set(row("glm")) == {"not run"}
    assert proofs.shortcomings(record) == ["gemma: changed since", "glm: not run"]


def test_why_something_is_not_proven_is_printed(record: Record, convert: Any) -> None:
    assert "has changed since" not in convert("families").out
    record["families"]["mpt"]["sizes"]["mpt-tiny"]["vllm"] = {"result": "lacking", "reason": "was supported until v1"}
    record["runs"]["now"]["code"] = "other"
    answer = convert("families")
    assert "mpt-tiny, vllm, lacking: was supported until v1" in answer.out
    assert "Shared code has changed since" in answer.out


def test_json_has_the_proofs_of_every_size(record: Record, convert: Any) -> None:
    found = json.loads(convert("families", "--json").out)
    assert found["runs"]["now"]["revision"] == "abc"
    assert found["families"].keys() == set(registry.names())
    gemma = found["families"]["gemma"]
    assert gemma["state"] == "recorded"
    assert gemma["proofs"]["gemma-tiny"]["vllm"] == {"result": "proven", "tokens": 24}
    assert gemma["sizes"]["gemma-2b"] == 2_506_172_416


def test_one_form_at_a_time(convert: Any) -> None:
    answer = convert("families", "--json", "--markdown")
    assert answer.code == 2
    assert "give one of them" in answer.err
