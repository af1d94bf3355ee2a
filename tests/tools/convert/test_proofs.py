"""The shipped proofs.json: up to date for every family and tested size, without failures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.families import registry
from tools.convert import proofs


def test_every_family_and_size_is_proven_as_it_is() -> None:
    assert proofs.shortcomings(proofs.load()) == []


def test_the_document_is_what_the_command_prints(convert: Any) -> None:
    document = proofs.RECORD.with_name("FAMILIES.md")
    assert document.read_text(encoding="utf-8") == convert("families", "--markdown").out


def test_whatever_a_family_says_is_in_its_description() -> None:
    family = registry.FAMILIES["gemma"]
    configs = dict(family.size_configs)
    tiny = configs["gemma-tiny"]
    changed = [
        replace(family, size_configs=configs | {"another": tiny}),
        replace(family, size_configs=configs | {"gemma-tiny": {**tiny, "rope_theta": 1e6}}),
    ]
    found = {proofs.description(given) for given in (family, *changed)}
    assert len(found) == 3
    assert proofs.description(family) in found


@pytest.mark.parametrize("part", ["own_table", "read", "write"])
def test_a_change_in_the_table_or_the_configuration_is_one_of_the_description(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = registry.FAMILIES["gemma"]
    before = proofs.description(family)

    def table(a: Any) -> Any:
        known = family.table(a)
        return replace(known, rules=known.rules[::-1])

    other = {
        "own_table": table,
        "read": lambda fields: family.read(fields).with_values(norm={"epsilon": 0.5}),
        "write": lambda a: family.write(a) | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
    }
    changed = replace(family, **{part: other[part]})
    monkeypatch.setitem(registry.FAMILIES, "gemma", changed)
    assert proofs.description(changed) != before


def test_the_files_that_are_shared_are_in_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("families", "mapping", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text('"""Before."""\n\na = f(1)\n')
    monkeypatch.setattr(proofs, "_SHARED", tmp_path)
    before = proofs.code()
    module = tmp_path / "model" / "a.py"
    module.write_text('"""After."""\na = f(\n    1\n)  # one\n')
    assert proofs.code() == before
    for other in ("a = f(2)\n", 'b = """Before."""\na = f(1)\n', "if a:\n    a = f(1)\n"):
        module.write_text(other)
        assert proofs.code() != before
