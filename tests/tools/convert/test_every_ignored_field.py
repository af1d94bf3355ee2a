"""--ignore-config-field: an unknown field passes, is recorded, and comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

_FIELD = {"made_up_scale": 2.0}


def facts(directory: Path) -> Any:
    return json.loads((directory / "manifest.json").read_text())["facts"].get("ignored_config_fields")


@pytest.mark.parametrize("kind", ["megatron", "te"])
def test_field_passes_is_recorded_and_comes_back(convert: Any, tmp_path: Path, kind: str) -> None:
    assert convert("init", "--size", "tiny", "--target", tmp_path / "hf").code == 0
    (tmp_path / "hf" / "manifest.json").unlink()
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | _FIELD
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    command = (f"to-{kind}", "--source", tmp_path / "hf", "--target", tmp_path / "there")
    refused = convert(*command)
    assert refused.code == 2
    assert "--ignore-config-field made_up_scale" in refused.err
    assert not (tmp_path / "there").exists()
    done = convert(*command, "--ignore-config-field", "made_up_scale")
    assert done.code == 0, done.err
    assert facts(tmp_path / "there") == ["made_up_scale"]
    back = convert("to-hf", "--source", tmp_path / "there", "--target", tmp_path / "back")
    assert back.code == 0, back.err
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    assert facts(tmp_path / "back") == ["made_up_scale"]
    again = convert(f"to-{kind}", "--source", tmp_path / "back", "--target", tmp_path / "again")
    assert again.code == 0, again.err  # the manifest of its source has the name


def test_init_carries_the_field(convert: Any, tmp_path: Path) -> None:
    assert convert("init", "--size", "tiny", "--target", tmp_path / "hf").code == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | _FIELD
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ("init", "--model-config", tmp_path / "config.json", "--target", tmp_path / "new")
    assert convert(*command).code == 2
    assert convert(*command, "--ignore-config-field", "made_up_scale,absent").code == 2
    assert convert(*command, "--ignore-config-field", "made_up_scale").code == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["made_up_scale"] == 2.0
    assert facts(tmp_path / "new") == ["made_up_scale"]
