"""A run has the chat format that its model is trained with, and the source's files otherwise."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.data.tokenizer import chat_templates
from shared.training.data_sources import DataSource
from shared.training.run_hf_files import run_hf_files

CONFIG = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 0}


def _files(folder: Path, **contents: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_jinja", ".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def _inputs(source: Path, *data: tuple[Path, dict[str, Any]]) -> Any:
    """What `run_hf_files` reads of the inputs of a run."""
    sources = tuple(
        DataSource(
            path=path, name=path.name, splits={}, vocab_size=4, tokenizer=path, facts={"format": "packed", **facts}
        )
        for path, facts in data
    )
    return SimpleNamespace(source=SimpleNamespace(hf_files=source, path=source, manifest=None), data=sources)


def test_a_base_model_gets_template_and_end_token(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = _files(
        tmp_path / "base", tokenizer_json="{}", config_json=CONFIG, tokenizer_config_json={"eos_token": "<e>"}
    )
    data = _files(tmp_path / "data", tokenizer_json="{}", chat_template_jinja="new")
    with run_hf_files(_inputs(base, (data, {"turn_end_token_ids": [3]}))) as files:
        assert chat_templates(files) == {"default": "new"}
        made = json.loads((files / "generation_config.json").read_text())
        assert made == {"bos_token_id": 1, "eos_token_id": [3, 0]}
        assert json.loads((files / "tokenizer_config.json").read_text()) == {"eos_token": "<e>"}
    said = capfd.readouterr().err
    assert f"chat template: of --data {data}, which the model is trained with (--source had none)" in said
    assert "generation_config.json: eos_token_id [3, 0]" in said
    assert not (base / "chat_template.jinja").exists()


def test_another_template_is_replaced_wherever_it_stands(tmp_path: Path) -> None:
    chat = _files(
        tmp_path / "chat",
        tokenizer_json="{}",
        config_json=CONFIG,
        generation_config_json={"eos_token_id": 3, "temperature": 0.6},
        tokenizer_config_json={"chat_template": [{"name": "default", "template": "old"}]},
        chat_template_json={"chat_template": "older"},
        additional_chat_templates__rag_jinja="old",
    )
    data = _files(tmp_path / "data", tokenizer_json="{}", tokenizer_config_json={"chat_template": "new"})
    with run_hf_files(_inputs(chat, (data, {"turn_end_token_ids": [2, 3]}))) as files:
        assert chat_templates(files) == {"default": "new"}
        assert "chat_template" not in json.loads((files / "tokenizer_config.json").read_text())
        assert not list(files.glob("additional_chat_templates/*"))
        assert json.loads((files / "generation_config.json").read_text()) == {
            "eos_token_id": [2, 3],
            "temperature": 0.6,
        }


def test_what_is_the_same_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    named = {"default": "same", "rag": "other"}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    source = _files(
        tmp_path / "source", tokenizer_json="{}", config_json=CONFIG, tokenizer_config_json={"chat_template": listed}
    )
    data = _files(
        tmp_path / "data", tokenizer_json="{}", chat_template_jinja="same", additional_chat_templates__rag_jinja="other"
    )
    assert chat_templates(source) == chat_templates(data) == named
    with run_hf_files(_inputs(source, (data, {"turn_end_token_ids": [0]}))) as files:
        assert files == source
    assert not capfd.readouterr().err


def test_pretraining_data_changes_no_template(tmp_path: Path) -> None:
    source = _files(tmp_path / "source", tokenizer_json="{}", config_json=CONFIG)
    data = _files(tmp_path / "data", tokenizer_json="{}", chat_template_jinja="new")
    with run_hf_files(_inputs(source, (data, {"format": "indexed"}))) as files:
        assert files == source


def test_a_second_template_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = _files(tmp_path / "source", config_json=CONFIG)
    one, other = (_files(tmp_path / name, tokenizer_json="{}", chat_template_jinja=name) for name in ("one", "other"))
    with run_hf_files(_inputs(source, (one, {}), (other, {}))) as files:
        assert chat_templates(files) == {"default": "one"}
        assert (files / "tokenizer.json").is_file()  # the source has no tokenizer
    _files(source, tokenizer_json="{}")
    with run_hf_files(_inputs(source, (one, {}), (other, {}))) as files:
        assert chat_templates(files) == {"default": "one"}
    assert f"--data {other} was rendered with another chat template" in capfd.readouterr().err


def test_the_training_of_a_source_goes_into_its_model_card(tmp_path: Path) -> None:
    base = _files(tmp_path / "base", tokenizer_json="{}", config_json=CONFIG)
    inputs = _inputs(base, (_files(tmp_path / "data", tokenizer_json="{}"), {}))
    inputs.source.manifest = SimpleNamespace(
        tool="pretrain",
        command="train",
        version="0.1.0",
        parents=[SimpleNamespace(flag="source", name="init"), SimpleNamespace(flag="data", name="corpus")],
        facts={"step": 3},
    )
    with run_hf_files(inputs) as files:
        text = (files / "README.md").read_text()
    assert "1. `pretrain train` 0.1.0: `--source init`, `--data corpus`; step 3\n" in text
    inputs.source.manifest.tool = "convert"
    with run_hf_files(inputs) as files:
        assert files == base
