"""An Architecture's dictionary: every older version is readable, a newer version is refused with a clear message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.architecture import dictionary
from shared.architecture.architecture import MoE
from shared.errors import UserError
from shared.families import registry

GOLDEN = Path(__file__).parents[2] / "golden"
SIZES = registry.sizes()


def written(name: str) -> dict[str, Any]:
    """As a manifest has it."""
    data: dict[str, Any] = json.loads(json.dumps(SIZES[name].to_dict()))
    return data


def test_every_size_comes_back() -> None:
    assert [name for name in SIZES if dictionary.read(written(name)) != SIZES[name]] == []


@pytest.mark.parametrize("version", [1, 2])
def test_what_released_tools_wrote_stays_readable(version: int) -> None:
    """tests/golden/architecture/version_N.json: sizes of each kind as the tools that first wrote version N had them."""
    golden = json.loads((GOLDEN / "architecture" / f"version_{version}.json").read_text())
    assert len(golden) > 12
    assert [name for name, data in golden.items() if dictionary.read(data) != SIZES[name]] == []


def test_manifests_of_contract_1_stay_readable() -> None:
    found = 0
    for manifest in sorted(GOLDEN.glob("contract-1/*/manifest.json")):
        data = json.loads(manifest.read_text())["facts"].get("architecture")
        if data is not None:
            config = next(iter(manifest.parent.rglob("config.json"))).parent
            assert dictionary.read(data) == registry.from_files(config)
            found += 1
    assert found >= 2


def test_layers_are_runs() -> None:
    runs = written("deepseek-v3")["layers"]
    assert [(run["first"], run["last"], run["mlp"]["class"]) for run in runs] == [(0, 2, "MLP"), (3, 60, "MoE")]
    read = dictionary.read(written("deepseek-v3"))
    assert len(read.kinds) == 2
    assert read.layers_of(MoE) == tuple(range(3, 61))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "facts.architecture.version is 3; this release reads 1 to 2; upgrade this tool"),
        ({"surprise": 1}, "surprise"),
        ({"layers": []}, "has no layers"),
        ({"layers": [{"first": 0}]}, "mixer"),
        ({"head": {"class": "Tail"}}, "Tail"),
        ({"head": {"class": "Head", "tied": True, "norm": None, "surprise": 1}}, "Head has no surprise"),
    ],
)
def test_what_is_newer_or_damaged_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dictionary.read(written("tiny") | change)


def test_an_unknown_field_of_version_1_is_refused() -> None:
    data = json.loads((GOLDEN / "architecture" / "version_1.json").read_text())["tiny"]
    with pytest.raises(UserError, match="surprise"):
        dictionary.read(data | {"surprise": 1})
