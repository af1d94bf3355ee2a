"""Deliberate mistakes in families are found by `verify`'s logits.

A mistake is tried on a few sizes that represent its kind (`tests.tools.convert.mistakes.spread`). MISTAKES=all, `make
proofs` and FAMILIES try all mistakes on all sizes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.families import registry
from tests.tools.convert.conftest import CHOSEN, SIZES
from tests.tools.convert.mistakes import CARELESS, mistakes_of, module_mistakes, spread

ALL = {size: mistakes_of(a) for size, a in SIZES.items()}
EVERYTHING = os.environ.get("MISTAKES") == "all" or bool(os.environ.get("PROOFS") or CHOSEN)
TRIED = ALL if EVERYTHING else spread(SIZES)


def test_no_kind_of_mistake_is_lost() -> None:
    """Every kind of every family is tried, and every name on two families where two have it."""
    tried = spread(SIZES)
    kinds = {mistake.kind for mistakes in ALL.values() for mistake in mistakes}
    assert {mistake.kind for mistakes in tried.values() for mistake in mistakes} == kinds
    families: dict[str, set[str]] = {}
    families_tried: dict[str, set[str]] = {}
    for found, everywhere in ((families, ALL), (families_tried, tried)):
        for size, mistakes in everywhere.items():
            for mistake in mistakes:
                found.setdefault(mistake.name, set()).add(SIZES[size].family)
    for name, known in families.items():
        assert families_tried[name] <= known
        assert len(families_tried[name]) >= min(len(known), 2), name


def test_every_mistake_changes_the_family() -> None:
    """Each changes a rule or the architecture, and no two of a size are the same."""
    for size, mistakes in ALL.items():
        a, table = SIZES[size], registry.table_of(SIZES[size])
        readings = [mistake.reading(a) for mistake in mistakes if mistake.reading(a) != a]
        assert len(set(readings)) == len(readings), size
        assert len({mistake.name for mistake in mistakes}) == len(mistakes), size
        for mistake in mistakes:
            rules = any(mistake.rule(rule) is not rule for rule in table.rules)
            assert rules != (mistake.reading(a) != a), (size, mistake.name)


@pytest.mark.skipif(bool(CHOSEN), reason="of all families")
def test_every_careless_reading_is_made() -> None:
    names = {mistake.name for mistakes in ALL.values() for mistake in mistakes}
    assert {f"{holder}.{field}" for holder, values in CARELESS.items() for field in values} <= names


@pytest.mark.parametrize("size", TRIED)
def test_a_mistake_is_found(
    size: str,
    write_architecture: Any,
    convert: Any,
    remote_code: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    subtests: pytest.Subtests,
    proof: Any,
) -> None:
    from tools.convert import verify_logits

    right = verify_logits._transformers
    known: list[torch.Tensor] = []

    def once(source: Path, of: Any, ids: torch.Tensor, remote: bool) -> torch.Tensor:
        if not known:  # the same ids each time: one seed
            known.append(right(source, of, ids, remote))
        return known[0]

    monkeypatch.setattr(verify_logits, "_transformers", once)
    architecture, mistakes = SIZES[size], TRIED[size]
    source = write_architecture(tmp_path / "hf", architecture)
    with proof("mistakes", size=size) as figures:
        figures |= {"caught": 0, "of": len(mistakes)}
        family = registry.FAMILIES[architecture.family]
        for index, mistake in enumerate(mistakes):
            monkeypatch.setitem(registry.FAMILIES, architecture.family, mistake.family(family, architecture))
            target = tmp_path / f"megatron{index}"
            assert convert("to-megatron", "--source", source, "--target", target).code == 0
            with subtests.test(mistake.name):
                words = ("--source", source, "--target", target, "--positions", "256", *remote_code(architecture))
                answer = convert("verify", *words)
                assert answer.code == 1
                assert "logits differ by" in answer.err
                figures["caught"] += 1
        assert figures["caught"] == figures["of"]


def test_a_wrong_module_is_found(
    write_architecture: Any,
    convert: Any,
    remote_code: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    subtests: pytest.Subtests,
) -> None:
    tried: dict[str, set[str]] = {}
    for size, architecture in SIZES.items():
        source, target = tmp_path / f"{size}.hf", tmp_path / f"{size}.megatron"
        for name, module, function, wrong in module_mistakes(architecture):
            families = tried.setdefault(name, set())
            if not EVERYTHING and (len(families) == 2 or architecture.family in families):
                continue
            families.add(architecture.family)
            if not target.exists():
                convert("to-megatron", "--source", write_architecture(source, architecture), "--target", target)
            with subtests.test(name, size=size), monkeypatch.context() as patch:
                patch.setattr(module, function, wrong)
                words = ("--source", source, "--target", target, *remote_code(architecture))
                assert "logits differ by" in convert("verify", *words).err
    assert CHOSEN or min(len(families) for families in tried.values()) >= 2
