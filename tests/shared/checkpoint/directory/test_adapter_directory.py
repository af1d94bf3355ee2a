"""An adapter given for a model is refused with its base and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.checkpoint.directory.open import open_checkpoint
from shared.errors import UserError


def adapter(path: Path, *others: str, **fields: Any) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | fields))
    for name in ("adapter_model.safetensors", *others):
        (path / name).write_text("{}")
    return path


@pytest.mark.parametrize("others", [(), ("config.json",), ("tokenizer.json",), ("config.json", "training_args.bin")])
@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_an_adapter_is_named_with_its_base_and_the_command(tmp_path: Path, others: tuple[str, ...], kind: Any) -> None:
    path = adapter(tmp_path / "lora", *others, base_model_name_or_path="org/base")
    with pytest.raises(UserError) as refused:
        open_checkpoint(path, kinds=(kind,), flag="--source")
    message = str(refused.value)
    assert message.startswith(f"--source {path} is an adapter")
    assert f"convert merge-lora --source BASE --adapter {path}" in message
    assert message.endswith("BASE: org/base")


def test_an_adapter_without_base_or_of_another_method(tmp_path: Path) -> None:
    path = adapter(tmp_path / "ia3", peft_type="IA3")
    with pytest.raises(UserError, match=r"with peft; BASE: the model that it was trained on$"):
        open_checkpoint(path, kinds=("hf",), flag="--source")


def test_its_tokenizer_and_a_model_beside_it_are_read(tmp_path: Path) -> None:
    path = adapter(tmp_path / "lora", "tokenizer.json")
    assert open_checkpoint(path, kinds=("tokenizer", "hf"), flag="--tokenizer").kind == "tokenizer"
    path = adapter(tmp_path / "both", "config.json", "model.safetensors")
    assert open_checkpoint(path, kinds=("hf",), flag="--source").kind == "hf"
